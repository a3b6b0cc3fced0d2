"""`lora eval`: columns side by side, FinLoRA's tasks, classifiers and the hand-off to lm-eval."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lora
from command_line import Lora, runner
from conftest import randomize, same_bits, snapshot
from lora.data.encode import encode_rows
from lora.data.template import PromptTemplate
from lora.evaluation.columns import BASE, MERGED, as_column
from lora.train.base import load_base, load_tokenizer
from lora.train.classify import class_logits, encode_labelled, load_classifier, with_head
from lora.train.generation import generate
from tiny_base import save_tiny_base, save_tiny_encoder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lora:
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An adapter whose values change the answers, and the model that has it."""
    model = lora.inject(load_base(str(base), torch.float32), r=4, targets="all-linear")
    out = tmp_path_factory.mktemp("adapter")
    lora.save(randomize(model, std=0.5), out)
    return out, model.eval()


ROWS = [{"prompt": f"count {n}", "completion": " ".join(map(str, range(n)))} for n in (3, 5, 7)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_base_adapter_and_merged_stand_side_by_side(
    cli: Lora, base: Path, adapted: tuple[Path, Any], rows: Path, tmp_path: Path
) -> None:
    adapter, model = adapted
    kept = tmp_path / "kept" / "answers.jsonl"
    ask = ["eval", base, "--adapter", adapter, "--data", rows, "--max-new-tokens", 6, "--merged", "--answers", kept]
    code, out, err = cli(*ask, "--json")
    assert (code, err) == (0, f"answers: {kept}\n")
    lines = {line["metric"]: line for line in json.loads(out)}
    assert list(lines) == ["perplexity", "bleu", "rouge_l", "exact"]
    assert set(lines["bleu"]) == {"task", "rows", "metric", "base", "adapter", "merged"}
    assert lines["perplexity"]["adapter"] == pytest.approx(lines["perplexity"]["merged"], rel=1e-3)

    tok = load_tokenizer(str(base))
    answers = [json.loads(line) for line in kept.read_text().splitlines()]
    prompts = [row["prompt"] for row in ROWS]
    assert [row["adapter"] for row in answers] == generate(model, tok, prompts, max_new_tokens=6)
    with lora.disabled(model):
        assert [row["base"] for row in answers] == generate(model, tok, prompts, max_new_tokens=6)
        # A mean over tokens, one row at a time.
        total, count = 0.0, 0
        for row in encode_rows(ROWS, PromptTemplate(tok), 128).rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with torch.no_grad():
                trained = int((labels[:, 1:] != -100).sum())
                total, count = total + float(model(ids, labels=labels).loss) * trained, count + trained
    assert lines["perplexity"]["base"] == pytest.approx(math.exp(total / count), rel=1e-4)

    wrapped = Path(shutil.copytree(adapter, tmp_path / "wrapped"))
    (wrapped / "run.json").write_text(json.dumps({"template": "inst"}))
    ask = ["eval", base, "--adapter", wrapped, "--data", rows, "--max-new-tokens", 6, "--metrics", "exact"]
    assert cli(*ask, "--answers", kept)[0] == 0
    as_trained = [json.loads(line)["adapter"] for line in kept.read_text().splitlines()]
    assert as_trained == generate(model, tok, prompts, max_new_tokens=6, style="inst")
    assert as_trained != [row["adapter"] for row in answers]  # the prompts were without the wrapper then

    code, table, _ = cli("eval", base, "--data", rows, "--metrics", "exact", "--max-new-tokens", 2)
    assert code == 0
    assert [line.split() for line in table.splitlines() if "--" not in line] == [
        ["task", "rows", "metric", "base"], ["data", "3", "exact", "0.00"],
    ]  # fmt: skip


def test_a_merged_column_leaves_the_model_as_it_was(adapted: tuple[Path, Any]) -> None:
    _, model = adapted
    before = snapshot(model)
    for column in (MERGED, BASE):
        with pytest.raises(RuntimeError), as_column(model, column, adapted=True):
            raise RuntimeError
        assert same_bits(snapshot(model), before)


def test_finloras_tasks_are_scored_by_the_first_label(cli: Lora, tmp_path: Path) -> None:
    """An adapter that learned to say one label behind [INST]: what it says is found, and the floor stands beside it."""
    folder = save_tiny_base(tmp_path / "base")
    files = tmp_path / "test"
    files.mkdir()
    context = (
        "Instruction: What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}."
    )
    labels = ["negative", "positive", "positive", "neutral"]
    rows = [
        {"context": f"{context}\nInput: share {n} moved\nAnswer: ", "target": label} for n, label in enumerate(labels)
    ]
    for name in ("tfns", "fiqa"):
        (files / f"{name}_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = load_base(str(folder), torch.float32)
    tok = load_tokenizer(str(folder))
    lora.inject(model, r=4, targets="all-linear")
    data = encode_rows([{**row, "target": "Neutral!"} for row in rows], PromptTemplate(tok, "inst"), 128).rows
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        for row in data:
            model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
        optimizer.step()
    lora.save(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "run.json").write_text(json.dumps({"template": "inst"}))

    code, out, _ = cli(
        "eval", folder, "--adapter", tmp_path / "adapter", "--task", "tfns,fiqa", "--task-dir", tmp_path, "--json"
    )
    assert code == 0
    found = {(line["task"], line["metric"]): line for line in json.loads(out)}
    assert {task for task, _ in found} == {"tfns", "fiqa"}
    accuracy = found["tfns", "accuracy"]
    assert (accuracy["most_frequent_label"], accuracy["adapter"], accuracy["rows"]) == (50.0, 25.0, 4)
    assert found["fiqa", "no_label"]["adapter"] == 0.0
    assert found["fiqa", "f1"]["adapter"] == pytest.approx(10.0)  # neutral: P 1/4, R 1, F1 0.4, one row of four


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give one of --data FILE, --task NAMES and --lm-eval TASKS"),
        (["--task", "tfns"], 2, "--task and --task-dir go together"),
        (["--task", "tfns", "--task-dir", ".", "--metrics", "f1"], 2, "--metrics goes with --data"),
        (["--data", "x.jsonl", "--merged"], 2, "merged: there is no adapter to merge"),
        (["--data", "x.jsonl"], 3, "data: 'x.jsonl' is not there"),
        (["--task", "tfns", "--task-dir", "."], 3, "task_dir: '.' has no tfns_test.jsonl"),
        (["--lm-eval", "arc_easy"], 2, "lm-eval: it needs the package of that name; pip install lm-eval"),
    ],
)
def test_what_cannot_be_evaluated(cli: Lora, base: Path, arguments: list[str], code: int, message: str) -> None:
    found, out, err = cli("eval", base, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1, err


def test_lm_eval_gets_the_model_as_each_column(
    cli: Lora, base: Path, adapted: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name that records what it gets: a model that is the base, then the adapter, then merged."""
    ids = load_tokenizer(str(base))("count three", return_tensors="pt").input_ids
    asked: list[Any] = []

    class HFLM:
        def __init__(self, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
            self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    def simple_evaluate(model: HFLM, tasks: list[str], limit: int | None) -> dict[str, Any]:
        with torch.no_grad():
            logits = model.model(ids).logits
        asked.append((type(model.model).__name__, tasks, limit, model.batch_size, logits))
        return {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": len(asked) / 8, "acc_stderr,none": "N/A"}}}

    package, models, hugging = (
        ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    )
    package.__spec__ = sys.__spec__
    package.simple_evaluate, hugging.HFLM = simple_evaluate, HFLM  # type: ignore[attr-defined]
    for module in (package, models, hugging):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    adapter, model = adapted
    ask = ["eval", base, "--adapter", adapter, "--lm-eval", "arc_easy,piqa", "--limit", 5, "--batch-size", 2]
    code, out, err = cli(*ask, "--merged")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].split() == ["arc_easy", "acc,none", "0.12", "0.25", "0.38"]
    with torch.no_grad():
        adapted_logits = model(ids).logits
        with lora.disabled(model):
            base_logits = model(ids).logits
    for (kind, tasks, limit, size, logits), expected in zip(
        asked, (base_logits, adapted_logits, adapted_logits), strict=True
    ):
        assert (kind, tasks, limit, size) == ("LlamaForCausalLM", ["arc_easy", "piqa"], 5, 2)
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_a_classifier_is_measured_by_its_labels(cli: Lora, tmp_path: Path) -> None:
    encoder = save_tiny_encoder(tmp_path / "encoder")
    tok = load_tokenizer(str(encoder))
    names = ["bad", "good"]
    model = load_classifier(str(encoder), names, tok, torch.float32)
    lora.inject(model, config=with_head(lora.LoraConfig(r=2, targets=["query"]), model))
    lora.save(nameless := randomize(model, std=0.5), tmp_path / "adapter")
    texts = [f"film number {n} of {n * n}" for n in range(8)]
    encoded = encode_labelled([{"text": text, "label": "bad"} for text in texts], tok, 64, names).rows
    labels = [names[i] for i in class_logits(model, encoded, 0).argmax(1).tolist()]
    assert set(labels) == set(names)
    (tmp_path / "rows.tsv").write_text(
        "\n".join(["sentence\tlabel", *map("\t".join, zip(texts, labels, strict=True))]) + "\n"
    )

    ask = ["eval", encoder, "--adapter", tmp_path / "adapter", "--data", tmp_path / "rows.tsv"]
    code, out, _ = cli(*ask, "--merged", "--answers", tmp_path / "answers.jsonl")
    assert code == 0
    assert [line.split()[-2:] for line in out.splitlines()[2:4]] == [["100.00", "100.00"]] * 2
    assert out.splitlines()[-1] == "base: its head is fresh, so that its labels are chance"
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["adapter"] for row in answers] == labels
    assert cli(*ask, "--merged")[1] == out  # the fresh head too is the same again
    assert cli("merge", encoder, tmp_path / "adapter", tmp_path / "merged")[0] == 0
    code, out, _ = cli("eval", tmp_path / "merged", "--data", tmp_path / "rows.tsv")
    assert (code, [line.split()[-1] for line in out.splitlines()[2:]]) == (0, ["100.00", "100.00"])
    code, _, err = cli("eval", encoder, "--adapter", tmp_path / "adapter", "--task", "tfns", "--task-dir", tmp_path)
    assert (code, err.startswith("error: the model is a classifier")) == (2, True)

    nameless.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}  # nobody gave it names
    lora.save(nameless, tmp_path / "nameless")
    ask[3] = tmp_path / "nameless"
    code, _, err = cli(*ask)
    assert code == 2 and "nameless' is a classifier's, and neither its run.json nor its file says its labels" in err
    (tmp_path / "nameless" / "run.json").write_text(json.dumps({"labels": names}))
    assert cli(*ask)[0] == 0

    for command in (["generate", "--prompt", "hello"], ["chat"]):
        for model, more in ((encoder, ["--adapter", tmp_path / "adapter"]), (tmp_path / "merged", [])):
            code, out, err = cli(command[0], model, *more, *command[1:])
            assert (code, out) == (2, "")
            assert "is a classifier" in err and f"lora eval {model} " in err and err.endswith("--data FILE scores it\n")


def test_a_classifier_from_rows_to_its_scores(cli: Lora, tmp_path: Path) -> None:
    """`lora train --task classify` with the defaults for a head, and `lora eval` by the labels that it keeps."""
    encoder = save_tiny_encoder(tmp_path / "encoder")
    words = {"good": ("fine", "warm", "bright"), "bad": ("dull", "cold", "grim")}
    texts = [(f"the film was {word}", label) for label, some in words.items() for word in some] * 4
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *map(",".join, texts)]) + "\n")
    data = ["--data", tmp_path / "rows.csv", "--eval-share", 0.25, "--out", tmp_path / "adapter"]
    short = ["--max-steps", 24, "--lr", 1e-2, "--batch-size", 18, "--no-check"]
    code, out, err = cli("train", "--task", "classify", "--model", encoder, *data, *short)
    assert code == 0, err
    assert json.loads((tmp_path / "adapter" / "run.json").read_text())["labels"] == ["bad", "good"]
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["bert.pooler", "classifier"])
    ask = ["eval", encoder, "--adapter", tmp_path / "adapter", "--data", tmp_path / "rows.csv"]
    code, out, _ = cli(*ask, "--json")
    assert code == 0
    accuracy, f1 = json.loads(out)
    assert min(accuracy["adapter"], f1["adapter"]) > 80 > accuracy["most_frequent_label"] == 50
