"""The `lora` command: its speed, its errors, and the whole way from rows to a merged model."""

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
from conftest import randomize, tiny_gpt2, tiny_llama
from lora.cli import main
from lora.commands.console import clean_warnings
from lora.commands.merge import new_folder
from lora.files.description import describe
from lora.train.base import load_base
from lora.train.generation import generate as answers_of
from tiny_base import ROOT, load_example_tokenizer, save_tiny_base

Lora = Callable[..., tuple[int, str, str]]
ROWS = [{"prompt": f"count {n}", "completion": " ".join(map(str, range(n)))} for n in range(1, 9)]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lora:
    """Runs the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.delenv("LORA_DEBUG", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return int(exit_.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of that base with values large enough to change its answers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    out = tmp_path_factory.mktemp("adapter")
    lora.save(randomize(lora.inject(model, r=4, targets="all-linear"), std=0.5), out)
    return out


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["inspect", "--help"]])
def test_help_takes_under_half_a_second(arguments: list[str]) -> None:
    """Processor time, the best of five: wall time would measure the machine's other work."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "lora.cli", *arguments], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize("arguments", [["train", "--help"], ["inspect"]])
def test_help_and_inspect_load_no_torch(arguments: list[str], adapter: Path) -> None:
    code = (
        "import sys, atexit\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules))))\n"
        f"sys.argv = ['lora', *{arguments + ([str(adapter)] if arguments == ['inspect'] else [])!r}]\n"
        "from lora.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "HEAVY []" in done.stdout
    assert len(done.stdout) > 200


def test_train_help_has_every_field_of_the_recipe(cli: Lora) -> None:
    from lora.train import Recipe

    code, out, _ = cli("train", "--help")
    assert code == 0
    shown = re.sub(r"\s+", " ", out)
    for name, field in Recipe.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert (field.description or "?").rstrip(".").split(":")[0][:40] in shown


def test_without_typer_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from lora.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "lora: the command needs typer; pip install 'lora-torch[train]'\n"


def test_version(cli: Lora) -> None:
    assert cli("--version") == (0, f"lora {lora.__version__}\n", "")


def test_an_error_is_one_message_without_a_traceback(cli: Lora, tmp_path: Path) -> None:
    code, out, err = cli("inspect", tmp_path / "gone")
    assert (code, out) == (2, "")
    assert err == f"error: adapter: '{tmp_path}/gone' does not exist; give the directory that lora.save wrote\n"


@pytest.mark.parametrize("place", ["before", "after", "environment"])
def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    arguments = ["inspect", str(tmp_path / "gone")]
    arguments = {"before": ["--debug", *arguments], "after": [*arguments, "--debug"]}.get(place, arguments)
    monkeypatch.setenv("LORA_DEBUG", "1" if place == "environment" else "0")
    monkeypatch.setattr(sys, "argv", ["lora", *arguments])
    with pytest.raises(lora.LoraError, match="does not exist"):
        main()


def test_from_rows_to_a_merged_model(cli: Lora, base: Path, rows: Path, tmp_path: Path) -> None:
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"model: {base}\ndata: {rows}\nepochs: 1\nlr: 1e-2\ntargets: all-linear\n")
    code, told, progress = cli("train", plan, "--out", out, "--max-steps", 6, "--warmup-steps", 1, "--batch-size", 8)
    assert code == 0, progress
    assert re.search(r"loss \d+\.\d{4} after 6 steps, \d+ s, [\d,]+ tokens/s", told)
    assert f"adapter: {out}" in told
    assert "8 rows (prompt/completion)" in progress
    assert re.search(r"step 6/6  loss [\d.]+ .*  [\d,]+ tokens/s  .*0:00:00 left", progress)

    answers = tmp_path / "answers"
    settings = ["--max-new-tokens", 8, "--batch-size", 3]
    assert cli("generate", base, "--input", rows, "--output", answers / "base.jsonl", *settings)[0] == 0
    with_adapter = ["--adapter", out, "--input", rows, "--output", answers / "adapter.jsonl"]
    assert cli("generate", base, *with_adapter, *settings)[0] == 0
    code, told, _ = cli("merge", base, out, merged, "--dtype", "fp32")
    assert code == 0
    assert "update kept" in told
    assert "and 9 modules that kept more" in told
    assert cli("generate", merged, "--input", rows, "--output", answers / "merged.jsonl", *settings)[0] == 0
    plain, adapted, folded = (
        [json.loads(line) for line in (answers / f"{name}.jsonl").read_text().splitlines()]
        for name in ("base", "adapter", "merged")
    )
    assert adapted == folded
    assert plain != adapted
    assert [{key: row[key] for key in ("prompt", "completion")} for row in adapted] == ROWS

    code, one, _ = cli("generate", base, "--adapter", out, "--prompt", ROWS[0]["prompt"], "--max-new-tokens", 8)
    assert (code, one.removesuffix("\n")) == (0, adapted[0]["generated"])


def test_the_merged_weights_are_the_bases_plus_the_update(cli: Lora, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "merged"
    assert cli("merge", base, adapter, out)[0] == 0
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    parts = load_file(adapter / "adapter_model.safetensors")
    for key, old in before.items():
        stem = "base_model.model." + key.removesuffix(".weight")
        update = torch.zeros(1)
        if stem + ".lora_A.weight" in parts:
            update = 2.0 * parts[stem + ".lora_B.weight"] @ parts[stem + ".lora_A.weight"]
            assert update.abs().max() > 0.1
        assert torch.allclose(after[key], old + update, atol=1e-5), key
    tokenizer = type(load_example_tokenizer()).from_pretrained(out)
    assert tokenizer.chat_template == load_example_tokenizer().chat_template


def test_merge_takes_the_place_of_an_earlier_merge_only(cli: Lora, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    code, _, err = cli("merge", base, adapter, out)
    assert code == 2
    assert "is not empty and not from an earlier merge" in err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]

    code, _, err = cli("merge", base, adapter, out, "--force")
    assert code == 0
    [aside] = [path for path in tmp_path.iterdir() if path.name.startswith("merged.old-")]
    assert (aside / "notes.txt").read_text() == "mine"
    assert str(aside) in err

    code, _, err = cli("merge", base, adapter, out, "--dtype", "bf16")  # an earlier merge needs no force
    was = f"./{adapter.name} into ./{base.name}"
    assert (code, f"replaced in {out}: an earlier merge of {was}\n" in err) == (0, True), err
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["merged", aside.name])

    (out / "model.gguf").write_text("made from it")  # a file of the user's in our folder is not deleted
    assert cli("merge", base, adapter, out)[0] == 0
    assert len(list(tmp_path.glob("merged.old-*/model.gguf"))) == 1


def test_an_adapter_of_another_base_is_refused_with_advice_for_a_command(
    cli: Lora, base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert cli("merge", base, adapter, tmp_path / "merged")[0] == 0
    for command in (["merge", tmp_path / "merged", adapter, tmp_path / "out"],
                    ["generate", tmp_path / "merged", "--adapter", adapter, "--prompt", "hi"]):  # fmt: skip
        code, _, err = cli(*command)
        assert (code, err.endswith("; give the base that it was trained on\n"), "lora.load" in err) == (2, True, False)
    changed = tmp_path / "changed"
    shutil.copytree(adapter, changed)
    settings = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 5}))
    code, _, err = cli("merge", base, changed, tmp_path / "out")
    assert (code, err.endswith("; copy the adapter again, whole\n")) == (2, True), err


def test_a_failed_merge_leaves_nothing(cli: Lora, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    with pytest.raises(OSError, match="disk"), new_folder(out) as folder:
        (folder / "half.safetensors").write_text("x")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []
    assert cli("merge", base, adapter, out)[0] == 0
    good = (out / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match="disk"), new_folder(out):
        raise OSError("disk full")
    assert (out / "model.safetensors").read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("which", ["base", "adapter", "parent"])
def test_merge_does_not_write_over_its_sources(cli: Lora, base: Path, adapter: Path, which: str) -> None:
    out = {"base": base, "adapter": adapter, "parent": adapter.parent}[which]
    code, _, err = cli("merge", base, adapter, out, "--force")
    assert code == 2
    assert "which is being merged; give another folder" in err


def test_a_lossy_merge_is_noted_in_one_line(cli: Lora, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora.save(randomize(lora.inject(model, r=2, targets=["q_proj"]), std=1e-5), tmp_path / "small")
    code, _, err = cli("merge", base, tmp_path / "small", tmp_path / "merged", "--dtype", "bf16")
    assert code == 0
    [line] = [line for line in err.splitlines() if line.startswith("note: merge:")]
    assert "kept less than 99% of their update in bfloat16" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "BASE"], "give either --prompt TEXT or --input FILE"),
        (["generate", "BASE", "--prompt", "x", "--input", "y", "--output", "z"], "give either --prompt"),
        (["generate", "BASE", "--input", "y"], "--input and --output go together"),
        (["generate", "BASE", "--input", "gone.jsonl", "--output", "z"], "input: 'gone.jsonl' is not there"),
        (["generate", "./gone", "--prompt", "x"], "model: there is no folder './gone'"),
        (["generate", "BASE", "--prompt", "x", "--dtype", "fp8"], "dtype is 'fp8'; allowed: auto, fp32"),
        (["generate", "BASE", "--prompt", "x", "--adapter", "gone"], "'gone' does not exist"),
        (["merge", "BASE", "gone", "out"], "'gone' does not exist"),
        (["train"], "recipe: 3 mistakes"),
        (["train", "--model", "m", "--data", "d", "--out", "o", "--r", "0"], "r: got 0; the rank is"),
        (
            ["train", "--model", "m", "--data", "d", "--out", "o", "--rank-pattern", "q_proj"],
            "rank_pattern: got 'q_proj'; write --rank-pattern NAME=NUMBER",
        ),
        (["train", "--model", "m", "--data", "d", "--out", "o", "--layers", "0,x"], "layers is ['0', 'x']; it must be"),
    ],
)
def test_errors_of_the_commands(
    cli: Lora, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*(str(base) if argument == "BASE" else argument for argument in arguments))
    assert (code, out) == (3 if "is not there" in message else 2, "")  # 3: the rows
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj,self_attn.v_proj", ["q_proj", "self_attn.v_proj"]),
        (r".*layers\.[01]\..*(q|v)_proj", r".*layers\.[01]\..*(q|v)_proj"),
    ],
)
def test_targets_on_the_command_line(value: str, expected: Any) -> None:
    from lora.commands.flags import parsed

    assert parsed("targets", value) == expected


def test_inspect_our_adapter(cli: Lora, adapter: Path) -> None:
    code, out, _ = cli("inspect", adapter)
    assert code == 0
    shapes = {"q_proj": ("4 x 32", "32 x 4"), "k_proj": ("4 x 32", "16 x 4"), "down_proj": ("4 x 48", "32 x 4")}
    for name, (a, b) in shapes.items():
        [line] = [line for line in out.splitlines() if name in line]
        assert line.startswith("model.layers.*.")
        parameters = 2 * 4 * sum(int(size.split(" x ")[1 - i]) for i, size in enumerate((a, b)))
        assert re.search(rf"\s2\s+{a}\s+{b}\s+4\s+2\s+{parameters:,}$", line), line
    file = adapter / "adapter_model.safetensors"
    total = sum(t.numel() for t in load_file(file).values())
    assert f"total {total:,} parameters, {file.stat().st_size:,} bytes, float32" in out
    assert "checksum: verified" in out
    assert "base model: " in out


def test_inspect_an_adapter_of_pefts(cli: Lora, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 9},
        alpha_pattern={"layers.0.self_attn.q_proj": 2},
        modules_to_save=["norm"],
    )
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    code, out, _ = cli("inspect", tmp_path)
    assert code == 0
    lines = [re.sub(r"\s+", " ", line) for line in out.splitlines()]
    assert "model.layers.*.self_attn.q_proj 1 4 x 48 48 x 4 4 1 384" in lines  # alpha 2 / sqrt 4
    assert "model.layers.*.self_attn.q_proj 2 4 x 48 48 x 4 4 4 768" in lines
    assert "model.layers.*.mlp.down_proj 3 9 x 80 48 x 9 9 2.66667 3,456" in lines
    assert "model.norm.weight 1 48 48" in lines
    assert "checksum: not recorded" in lines
    assert any(line.startswith("settings: r 4, alpha 8, dropout 0.0, rsLoRA, trained whole: norm") for line in lines)


def test_inspect_embeddings_and_dora(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["wte", "c_attn"], use_dora=False, fan_in_fan_out=True)
    get_peft_model(tiny_gpt2(), config).save_pretrained(tmp_path / "e")
    [wte] = [t for t in describe(tmp_path / "e").targets if t.name.endswith("wte")]
    assert (wte.a.shape, wte.b.shape) == ((4, 97), (48, 4))
    get_peft_model(tiny_llama(), LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "d"
    )
    found = describe(tmp_path / "d")
    assert [(t.name, t.modules) for t in found.others] == [("model.layers.*.self_attn.q_proj.lora_magnitude_vector", 3)]
    assert "DoRA" in str(found)
    total = sum(t.numel() for t in load_file(tmp_path / "d" / "adapter_model.safetensors").values())
    assert found.parameters == total


def copy_of(adapter: Path, tmp_path: Path) -> Path:
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_inspect_sees_one_flipped_bit(cli: Lora, adapter: Path, tmp_path: Path) -> None:
    file = copy_of(adapter, tmp_path) / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    code, out, err = cli("inspect", tmp_path)
    assert code == 2
    assert "checksum: WRONG" in out
    assert "is damaged" in err


def test_inspect_names_a_module_with_half_an_update(cli: Lora, adapter: Path, tmp_path: Path) -> None:
    file = copy_of(adapter, tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, file)
    code, out, _ = cli("inspect", tmp_path)
    assert code == 2
    assert "INCOMPLETE: model.layers.1.mlp.up_proj has only one of A and B" in out


def _garbage(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(content) and None


def _pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds list"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "peft_type is 'IA3'"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (_pickle_only, "is a pickle, which can run code and is never read"),
        (_garbage(b""), "damaged"),
        (_garbage(b"garbage" * 100), "damaged"),
        (_garbage((2).to_bytes(8, "little") + b"[]"), "damaged"),
        (_garbage((7).to_bytes(8, "little") + b'{"a":1}'), "damaged"),
        (_garbage((26).to_bytes(8, "little") + b'{"a":{"data_offsets":[0]}}'), "damaged"),
        (_garbage((28).to_bytes(8, "little") + b'{"a":{"data_offsets":[0,0]}}'), "damaged"),
    ],
)
def test_inspect_of_a_broken_folder(
    cli: Lora, adapter: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(copy_of(adapter, tmp_path))
    code, out, err = cli("inspect", tmp_path)
    assert (code, out) == (3 if "is not there" in message else 2, "")  # 3: the rows
    assert message in err
    assert "Traceback" not in err


def test_ctrl_c_ends_with_130(cli: Lora, monkeypatch: pytest.MonkeyPatch, adapter: Path) -> None:
    from lora.files import description

    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(description, "describe", interrupt)
    assert cli("inspect", adapter)[0] == 130


def test_the_module_runs_as_a_program(adapter: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora.cli", "inspect", str(adapter)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert "checksum: verified" in done.stdout


@pytest.fixture(scope="module")
def stored(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base as people save it quantized, by kind, in bf16 where it is not."""
    pytest.importorskip("bitsandbytes")
    folders = {}
    for kind in ("nf4", "int8"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        load_base(str(base), torch.bfloat16, kind).save_pretrained(folders[kind])
        load_example_tokenizer().save_pretrained(folders[kind])
    return folders


def notes(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.strip()]


def test_an_adapter_trained_on_a_quantized_base(cli: Lora, base: Path, rows: Path, tmp_path: Path) -> None:
    """Tried on the base that it was trained on, on another, and merged into the one that is not quantized."""
    pytest.importorskip("bitsandbytes")
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    data = ["--data", rows, "--out", out, "--max-steps", 6, "--warmup-steps", 1, "--lr", 1e-2]
    code, _, progress = cli(
        "train", "--model", base, *data, "--targets", "all-linear", "--quantize", "nf4", "--gradient-checkpointing"
    )
    assert code == 0, progress
    assert "plain torch over nf4" in progress
    assert "prepared: checkpointing" in progress

    ask = ["generate", base, "--adapter", out, "--prompt", "count 3", "--max-new-tokens", 4]
    code, _, err = cli(*ask, "--quantize", "nf4")
    assert (code, notes(err)) == (0, [])
    for quantize, other in (("none", "float32, not quantized"), ("int8", "int8")):
        code, _, err = cli(*ask, "--quantize", quantize)
        [note] = notes(err)
        assert code == 0
        assert re.match(rf"note: {out}: this adapter was trained on a base in .*nf4, and this one is in {other};", note)
    code, _, err = cli(*ask, "--quantize", "fp8")
    assert (code, notes(err)) == (2, ["error: quantize is 'fp8'; allowed: none, nf4, int8"])

    code, _, err = cli("merge", base, out, merged)
    [note] = notes(err)
    assert code == 0
    assert re.match(rf"note: {out}: this adapter was trained on a base in .*nf4, and this one is in float32,", note)
    before, after, parts = (
        load_file(folder / name)
        for folder, name in (
            (base, "model.safetensors"),
            (merged, "model.safetensors"),
            (out, "adapter_model.safetensors"),
        )
    )
    assert before.keys() == after.keys()
    stem = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    update = 2.0 * parts[stem + "B.weight"] @ parts[stem + "A.weight"]
    key = "model.layers.1.mlp.up_proj.weight"
    assert update.abs().max() > 1e-3
    assert torch.allclose(after[key], before[key] + update, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_a_base_that_is_stored_quantized(
    cli: Lora, stored: dict[str, Path], tmp_path: Path, kind: str, targets: Any
) -> None:
    from transformers import AutoModelForCausalLM

    ids = load_example_tokenizer()("count three", return_tensors="pt").input_ids
    model = load_base(str(stored[kind]), torch.bfloat16)
    lora.save(randomize(lora.inject(model, r=4, targets=targets), std=0.5), tmp_path / "adapter")
    with torch.no_grad():
        adapted = model.train()(ids).logits
    [by_hand] = answers_of(model, load_example_tokenizer(), ["count 3"], max_new_tokens=4)
    with lora.disabled(model):
        assert answers_of(model, load_example_tokenizer(), ["count 3"], max_new_tokens=4) != [by_hand]

    ask = ["--prompt", "count 3", "--max-new-tokens", 4, "--dtype", "bf16"]
    code, answer, err = cli("generate", stored[kind], "--adapter", tmp_path / "adapter", *ask)
    assert (code, notes(err)) == (0, [])
    assert answer.removesuffix("\n") == by_hand
    code, _, err = cli("generate", stored[kind], *ask, "--quantize", "nf4" if kind == "int8" else "int8")
    assert code == 2
    assert f"is stored in {kind}; leave quantize out" in err

    code, told, err = cli("merge", stored[kind], tmp_path / "adapter", tmp_path / "merged")
    assert (code, notes(err)) == (0, [])
    assert "bfloat16" in told
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert saved["model.layers.0.self_attn.v_proj.weight"].dtype == torch.bfloat16
    quantized = "quantization_config" in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert quantized == (targets != "all-linear")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(again.model.layers[0].self_attn.v_proj) is torch.nn.Linear
    kinds = {type(module).__name__ for module in again.modules() if "Linear" in type(module).__name__}
    assert kinds == ({"Linear", {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]} if quantized else {"Linear"})
    if quantized:  # through our forward: bitsandbytes' own on a CPU takes no 4-bit weight as narrow as these
        lora.inject(again, targets=["q_proj"])
    with torch.no_grad():
        logits = again.train()(ids).logits
    assert (logits - adapted).norm() < 0.05 * adapted.norm()
    if not quantized:
        assert cli("generate", tmp_path / "merged", *ask)[0] == 0


def test_a_merge_takes_the_dtype_that_it_is_given(cli: Lora, stored: dict[str, Path], tmp_path: Path) -> None:
    model = lora.inject(load_base(str(stored["nf4"]), torch.bfloat16), targets="all-linear")
    lora.save(randomize(model), tmp_path / "adapter")
    assert cli("merge", stored["nf4"], tmp_path / "adapter", tmp_path / "merged", "--dtype", "fp32")[0] == 0
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_a_note_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """A path in brackets is no markup."""
    with clean_warnings():
        warnings.warn("/runs/[bold]/a: [/] careful", lora.LoraWarning, stacklevel=1)
    assert capsys.readouterr().err == "note: /runs/[bold]/a: [/] careful\n"


def test_what_the_readme_types_on_a_quantized_base(cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its python block and its commands; without a GPU nothing is offloaded."""
    pytest.importorskip("bitsandbytes")
    (tmp_path / "examples" / "e2e").mkdir(parents=True)
    (tmp_path / "examples" / "tiny-llama-8m").symlink_to(ROOT / "examples" / "tiny-llama-8m")
    rows = (ROOT / "examples" / "e2e" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "examples" / "e2e" / "train.jsonl").write_text("".join(rows[:8]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Quantized bases\n")[2].partition("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    assert "over " in str(lora.summary(names["model"]))
    assert "prepared: checkpointing" in str(lora.summary(names["model"]))

    commands = [shlex.split(line) for line in re.findall(r"^(lora .*)$", section, re.M)]
    assert [command[1] for command in commands] == ["train", "generate", "merge"]
    short = {
        "train": ["--max-steps", 2, "--warmup-steps", 1, "--batch-size", 2],
        "generate": ["--max-new-tokens", 2],
        "merge": [],
    }
    for command in commands:
        typed = [word for word in command[1:] if word != "--offload" or torch.cuda.is_available()]
        code, _, err = cli(*typed, *short[command[1]])
        assert code == 0, err
    assert (tmp_path / "out/merged-nf4/model.safetensors").is_file()
