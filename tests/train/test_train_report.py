"""report.md and the card of an adapter: made from its folder, whatever stands in it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from lora import LoraError
from lora.train import load_recipe, run
from lora.train.card import MARK
from lora.train.card import write as write_card
from lora.train.places import base_name, data_name, published
from lora.train.report_page import page
from lora.train.report_page import write as write_report
from tiny_base import save_tiny_base
from tiny_run import recipe_of

HOSTILE = "a | b\n```python\n# Heading\n</td><script>x</script> [x](http://y) `c` \\| <!-- \ud800\u202e\x00 ![i](j)"
LINES = [
    {"name": "read back", "verdict": "yes", "text": "the logits of '/home/jane doe/runs/my adapter' in a fresh base"},
    {"name": "stops", "verdict": "yes", "text": "3 of 3 held-out rows; log in /srv/secret/place/log.txt"},
    {"name": "learned", "verdict": "no", "text": "2.0 | 1.9"},
]  # fmt: skip


def folder_of(tmp_path: Path, record: dict[str, Any] | None = None, **changes: Any) -> Path:
    """An adapter's folder after a run of three steps, by hand."""
    folder = tmp_path / "my-adapter"
    folder.mkdir(exist_ok=True)
    recipe = {
        "model": "/home/jane/models/tiny-base", "data": "/home/jane/secret/rows.jsonl", "out": str(folder),
        "eval_data": "C:\\Users\\Jane\\held.jsonl", "r": 4, "alpha": 8.0, "targets": "all-linear", "quantize": "none",
        "task": "generate", "exclude": [r".*\.(0|1)\.q_proj"], "track": [],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}), encoding="utf-8")
    kept = {
        "run": "ab", "format": "prompt/completion", "template": "chat", "rows": 12, "rows_too_long": 2,
        "max_length": 64, "quantisation": "double-quantised nf4", "versions": {"lora": "0.1.0"}, "skipped_steps": 1,
        "micro_batch": 4, "dtype": "float32", "length": {"steps": 3}, "outcome": {"lines": LINES, "seconds": 4.2},
        "metrics": {"loss": 1.5, "seconds": 83.4, "tokens": 12345, "tokens_per_second": 148.0, "steps": 3,
                    "trainable_parameters": 7424},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({**kept, **(record or {})}), encoding="utf-8")
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.0, "eval_seconds": 1.0}]
    lines += [{"step": n, "loss": 3.0 - n / 2, "lr": 1e-3, "memory": n << 30, "tokens": 10} for n in (1, 2, 3)]
    lines += [{"step": n, "eval_loss": loss, "eval_seconds": 1.0} for n, loss in ((2, 1.25), (3, 1.75))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    samples = [
        {"step": n, "sample": 1, "prompt": "count 3", "reference": "1 | 2", "answer": HOSTILE, "stopped": n > 0}
        for n in (0, 2, 3)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
    return folder


def settings(folder: Path, **changes: Any) -> None:
    """Changes the adapter's own settings."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def card_of(folder: Path) -> str:
    assert write_card(folder) is None
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_report_tells_the_run(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "loss.png").write_bytes(b"png")
    write_report(folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text == page(folder) and text.endswith("|\n")
    rows = (
        "| base | /home/jane/models/tiny-base |", "| quantization of the base | double-quantised nf4 |",
        "| targets | all-linear (q_proj, v_proj) |", "| r, alpha | 4, 8.0 |", "| template | chat |",
        "| rows | 12 (prompt/completion); 2 longer than 64 tokens left out |",
        "| learned | no | 2.0 &#124; 1.9 |", "![losses and learning rate by step](loss.png)",
        "| 0 | 3.0000 | 1.0000 |", "| 2 (best) | 1.2500 | 1.0000 |", "| 3 | 1.7500 | 1.0000 |",
        "| training loss | 2.5000 at the first step, 1.5000 at the last |",
        "| loss on held-out rows | 3.0000 before training, 1.2500 at step 2 |", "| tokens | 12,345 |",
        "| time of the steps | 0:01:23 (148.0 tokens/s) |", "| time of the check | 0:00:04 |",
        "| most memory | 3.0 GiB |", "| skipped steps | 1 |", "| exclude | .&#42;&#92;.(0&#124;1)&#92;.q_proj |",
    )  # fmt: skip
    assert [row for row in rows if f"\n{row}\n" not in text] == []
    assert [line for line in text.splitlines() if line.startswith("### ")] == ["### Step 0", "### Step 2", "### Step 3"]


def test_no_answer_of_a_model_breaks_the_report(tmp_path: Path) -> None:
    lines = page(folder_of(tmp_path)).splitlines()
    samples = [line for line in lines if line.startswith("| count 3 |")]
    assert len(samples) == 3 and all(line.replace("\\|", "").count("|") == 5 for line in samples)
    answer = samples[0].split(" | ")[2]
    assert not set("`*_[]\\|\x00\ud800\u202e") & set(answer) and answer.replace("<br>", "").count("<") == 0
    assert samples[0].endswith("| cut: it did not stop |") and samples[1].endswith("| by itself |")

    shown = MarkdownIt("commonmark").enable("table").render("\n".join(lines))  # what a reader of Markdown makes of it
    assert shown.count("<table>") == 5 + 3 and shown.count("<h1>") == 1 and shown.count("<h3>") == 3
    assert re.findall(r"<(?:script|pre|img|a )", shown) == []
    assert "a | b<br>```python<br># Heading<br>&lt;/td&gt;&lt;script&gt;" in shown


def test_a_report_of_many_and_long_samples_stays_short(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with (folder / "samples.jsonl").open("w") as file:
        for step in range(0, 400, 4):
            for number in range(30):
                file.write(
                    json.dumps({"step": step, "sample": number, "prompt": "p" * 9999, "answer": "`" * 9999}) + "\n"
                )
    text = page(folder)
    assert "### Step 0\n" in text and "### Step 396\n" in text and text.count("### Step") == 12
    assert "`samples.jsonl` has all" in text and "p" * 400 + " ..." in text and "p" * 401 not in text
    assert len(text) < 500_000


def test_a_folder_without_what_a_run_may_leave_out_has_a_report_and_a_card(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"outcome": None, "template": None})
    for name in ("metrics.jsonl", "samples.jsonl", "run.json", "adapter_config.json"):
        (folder / name).unlink()
        text, card = page(folder), card_of(folder)
        assert "## Settings" in text and "Did it work?" not in text and "## Curve" not in text
        assert "## Settings" in card and "## Check" not in card
    assert "## Samples" not in page(folder) and "## Evaluations" not in page(folder)
    (folder / "recipe.yaml").unlink()
    for write in (write_report, write_card):
        with pytest.raises(LoraError, match=r"has no recipe\.yaml"):
            write(folder)


def test_nothing_that_a_run_leaves_for_others_says_where_it_ran(tmp_path: Path) -> None:
    """What people upload has names alone; the way back keeps the paths, and is left out of uploads."""
    home = tmp_path / "jane doe"
    home.mkdir()
    base = save_tiny_base(home / "base")
    plan = recipe_of(base, home, max_steps=2, check=True, eval_share=0.2, samples=1, targets="all-linear")
    out = run(plan).out
    files = [path for path in out.iterdir() if path.is_file()]
    assert len(files) == 10 and [path.name for path in files if b"jane" in path.read_bytes()] == []
    assert (out / ".gitignore").read_text() == "checkpoints/\n"
    shown, kept = load_recipe(out / "recipe.yaml"), load_recipe(out / "checkpoints" / "recipe.yaml")
    assert (shown.model, shown.data, shown.out) == ("./base", "./rows.jsonl", "./out")
    assert kept.model_copy(update={name: getattr(shown, name) for name in ("model", "data", "out")}) == shown
    assert kept.model == str(base) and run(kept, resume="auto").metrics["steps"] == 2
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "./base"
    text = (out / "README.md").read_text()
    assert "base_model" not in text.split("---")[1] and "A LoRA adapter for base (a local model" in text
    assert "| base | ./base |" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("org/base", "org/base"), ("base", "base"), ("examples/rows.jsonl", "examples/rows.jsonl"), ("../x", "../x"),
        ("/home/jane/rows.jsonl", "./rows.jsonl"), ("/home/jane/set:train", "./set:train"), ("/a/b/", "./b"),
        ("~/models/base", "./base"), ("C:\\Users\\jane\\base", "./base"), ("\\\\host\\share\\rows", "./rows"),
    ],
)  # fmt: skip
def test_what_is_published_of_a_place(place: str, shown: str) -> None:
    assert published(place) == shown


def test_the_card_of_a_base_on_the_hub(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, model="org/base-1B", quantize="nf4")
    text = card_of(folder)
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "org/base-1B", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["lora", "base_model:adapter:org/base-1B"],
    }  # fmt: skip
    assert body.startswith(f"\n{MARK}\n\n# my-adapter\n")
    for line in (
        "lora generate org/base-1B --adapter my-adapter --quantize nf4 --prompt ...", "lora.load(base, \"my-adapter\")",
        "model = PeftModel.from_pretrained(base, \"my-adapter\")",
        "base = AutoModelForCausalLM.from_pretrained(\"org/base-1B\", dtype=\"float32\")",
        "vllm serve org/base-1B --enable-lora --max-lora-rank 8 --lora-modules my-adapter=./my-adapter",
        "| data | rows.jsonl |", "| held out | held.jsonl |", "| learned | no | 2.0 &#124; 1.9 |", "| r | 4 |",
        "| exclude | .&#42;&#92;.(0&#124;1)&#92;.q_proj |",
    ):  # fmt: skip
        assert f"\n{line}\n" in text, line


@pytest.mark.filterwarnings("error")
def test_the_card_says_no_place_of_the_users(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, out="/home/jane doe/runs/my adapter")
    text = card_of(folder)
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["lora"] and "base_model" not in text
    assert "tiny-base (a local model" in text and "| data | rows.jsonl |" in text
    assert "the logits of 'my adapter' in a fresh base" in text and "log in log.txt" in text
    for part in ("jane", "secret", "srv", "Users", "home", str(tmp_path), tmp_path.name):
        assert part.lower() not in text.lower(), part


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("org/base", ("org/base", True)), ("gpt2", ("gpt2", True)), ("./models/base", ("base", False)),
        ("/a/b/base/", ("base", False)), ("~/base", ("base", False)), ("C:\\m\\base", ("base", False)),
        ("a/b/c", ("c", False)), ("here/base", ("base", False)), ("../base", ("base", False)),
    ],
)  # fmt: skip
def test_a_base_is_on_the_hub_or_has_its_last_name_alone(
    said: str, name: tuple[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_name(said) == name
    assert base_name(".") == (tmp_path.name, False)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("org/set:main:train", "org/set:main:train"), ("/a/saved:train", "saved:train"),
        ("b/rows.csv.gz", "rows.csv.gz"),
        ("C:\\secret\\rows.jsonl", "rows.jsonl"), ("C:/secret/rows", "rows"), ("../rows", "rows"),
    ],
)  # fmt: skip
def test_rows_are_called_by_the_name_of_their_file(said: str, name: str) -> None:
    assert data_name(said) == name


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use_dora": True}, "does not serve the magnitudes of DoRA as"),
        ({"modules_to_save": ["score"], "bias": "all"}, "modules that were trained whole and trained biases"),
        ({"rank_pattern": {"q_proj": 2}}, "ranks or scales that differ"), ({"r": 1024}, "a rank above 512"),
        ({"lora_update": "mine"}, "PEFT and vLLM do not know"),
    ],
)  # fmt: skip
def test_the_card_says_what_others_do_not_serve(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    settings(folder, **changes)
    text = card_of(folder)
    assert why in text and "vllm serve" not in text


def test_the_card_of_a_classifier(tmp_path: Path) -> None:
    text = card_of(folder_of(tmp_path, {"labels": ["good", "b|ad"], "template": None}, task="classify"))
    assert "pipeline_tag: text-classification" in text and "Its labels: good, b&#124;ad." in text
    assert 'AutoModelForSequenceClassification.from_pretrained("tiny-base", num_labels=2' in text
    assert "lora generate" not in text


def test_a_readme_of_the_users_is_kept_and_one_of_a_run_is_renewed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    file = folder / "README.md"
    file.write_text("# My own\n")
    said = write_card(folder)
    assert said is not None and "README.md" in said and "left as it is" in said and file.read_text() == "# My own\n"
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    assert write_card(folder) is not None and file.is_symlink()
    file.unlink()
    first = card_of(folder)
    settings(folder, r=16)
    assert "--max-lora-rank 16" in card_of(folder) != first
    file.write_text(file.read_text().replace(MARK, ""))
    assert write_card(folder) is not None
    assert sorted(p.name for p in folder.iterdir() if p.name.endswith(".tmp")) == []


def test_both_are_imported_without_torch() -> None:
    code = "import sys, lora.train.card, lora.train.report_page; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
