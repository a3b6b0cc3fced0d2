"""Whole runs on a tiny base: what is written, what stays, and what stops them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

import lora
from lora import LoraError
from lora.data.collate import PaddingCollator
from lora.data.encode import IGNORED, encode_rows
from lora.data.template import PromptTemplate
from lora.train import Recipe, load_recipe, run
from lora.train import job as job_module
from lora.train.base import load_base
from tiny_base import save_tiny_base

ROWS = [{"prompt": f"count {n}", "completion": " ".join(map(str, range(n)))} for n in range(1, 13)]
Write = Callable[..., str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def write_rows(tmp_path: Path) -> Write:
    def write(rows: list[dict[str, str]], name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def recipe(base: Path, write_rows: Write, tmp_path: Path) -> Callable[..., Recipe]:
    def make(**changes: Any) -> Recipe:
        fields = {
            "model": str(base),
            "data": write_rows(ROWS),
            "out": str(tmp_path / "out"),
            "targets": "all-linear",
            "max_steps": 4,
            "batch_size": 4,
            "lr": 1e-2,
            "schedule": "constant",
            "warmup_steps": 0,
            "dtype": "fp32",
        }
        return Recipe.of(**{**fields, **changes})

    return make


def tensors(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_learns_and_writes_the_adapter_and_its_record_only(recipe: Callable[..., Recipe], base: Path) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    first = run(recipe(log_every=1, max_steps=1, out=recipe().out + "1")).metrics["loss"]
    plan = recipe(max_steps=60, batch_size=12, log_every=2, lr=0.03)
    result = run(plan)
    assert result.metrics["loss"] < 0.6 * first
    assert sorted(path.name for path in result.out.iterdir()) == [
        ".gitignore",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "loss.png",
        "metrics.jsonl",
        "recipe.yaml",
        "report.md",
        "run.json",
    ]
    written = load_recipe(result.out / "checkpoints" / "recipe.yaml")  # what was open is decided there
    assert {name: getattr(written, name) for name in plan.model_fields_set} == plan.model_dump(exclude_unset=True)
    record = json.loads((result.out / "run.json").read_text())
    assert record["metrics"] == result.metrics
    assert (record["format"], record["rows"], record["stopped"]) == ("prompt/completion", 12, None)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"max_length": 4}, "data: every row is longer than"), ({"targets": ["norm"]}, "targets: 'norm' fits "), ({}, "")],
)
def test_errors_come_before_what_was_chosen(recipe: Callable[..., Recipe], changes: dict[str, Any], told: str) -> None:
    """Reasons for defaults are of no use to whoever has to put a row right first."""
    screen = Console(file=io.StringIO(), width=200)
    plan = recipe(**{"max_steps": 1, "check": False, **changes})
    if told:
        with pytest.raises(LoraError, match=told):
            run(plan, console=screen)
    else:
        run(plan, console=screen)
    shown = screen.file.getvalue()
    assert ("default " in shown) == ("data: 12 rows" in shown) == (not told)


def test_metrics_count_what_was_trained(recipe: Callable[..., Recipe], base: Path) -> None:
    plan = recipe(max_steps=None, epochs=2, batch_size=5)
    metrics = run(plan).metrics
    template = PromptTemplate(job_module.load_tokenizer(str(base)))
    tokens = encode_rows(ROWS, template, 128).tokens
    assert metrics["tokens"] == 2 * tokens
    assert metrics["steps"] == 6
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"], rel=0.01)
    assert metrics["trainable_parameters"] == sum(t.numel() for t in tensors(plan.out).values())


def test_the_same_seed_gives_the_same_bits_and_another_does_not(recipe: Callable[..., Recipe]) -> None:
    outs = [recipe(out=recipe().out + name, seed=seed, dropout=0.1) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    a, b, c = (tensors(run(plan).out) for plan in outs)
    assert same(a, b)
    assert not same(a, c)


def test_accumulated_batches_weigh_every_token_alike(recipe: Callable[..., Recipe]) -> None:
    """Rows of unlike length: a mean of batch means would differ from the mean over tokens."""
    whole = run(recipe(batch_size=12, max_steps=3, log_every=3))
    parts = run(recipe(batch_size=3, grad_accum=4, max_steps=3, log_every=3, out=recipe().out + "2"))
    assert parts.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-4)
    for key, value in tensors(whole.out).items():
        assert torch.allclose(tensors(parts.out)[key], value, atol=2e-3), key


def test_the_first_loss_is_the_bases_own_on_the_completions(recipe: Callable[..., Recipe], base: Path) -> None:
    first = run(recipe(max_steps=1, batch_size=12, log_every=1)).metrics["loss"]
    tokenizer = job_module.load_tokenizer(str(base))
    model = load_base(str(base), torch.float32)
    total = count = 0.0
    for row in encode_rows(ROWS, PromptTemplate(tokenizer), 128).rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        on = torch.tensor(row["labels"][1:]) != IGNORED
        total, count = total - logp[on].sum().item(), count + on.sum().item()
    assert first == pytest.approx(total / count, rel=1e-4)


def test_eval_loss_is_that_of_the_saved_adapter(recipe: Callable[..., Recipe], base: Path, write_rows: Write) -> None:
    held_out = write_rows([{"prompt": "count 3", "completion": "0 1 2"}], "held.jsonl")
    plan = recipe(eval_data=held_out)
    metrics = run(plan).metrics
    model = load_base(str(base), torch.float32)
    lora.load(model, plan.out)
    template = PromptTemplate(job_module.load_tokenizer(str(base)))
    batch = PaddingCollator(0)(encode_rows([{"prompt": "count 3", "completion": "0 1 2"}], template, 128).rows)
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-4)


def test_checkpointing_recomputes_the_same_adapter(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *a, **k: (passes.append(1), forward(*a, **k))[1])
    plain = tensors(run(recipe(check=False)).out)
    once = len(passes)
    plan = recipe(check=False, gradient_checkpointing=True, out=recipe().out + "2")
    assert same(tensors(run(plan).out), plain)
    assert len(passes) - once == 2 * once


def test_the_adapters_settings_reach_its_config(recipe: Callable[..., Recipe]) -> None:
    plan = recipe(targets=["q_proj"], train=["norm"], rslora=True, alpha=4)
    keys = tensors(run(plan).out)
    assert sum("norm" in key for key in keys) == 1
    assert all("q_proj" in key or "norm" in key for key in keys)
    config = json.loads((Path(plan.out) / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["modules_to_save"]) == (True, ["model.norm"])
    # Engines read lora_alpha as a whole number; 4.0 in the file is none.
    assert (config["lora_alpha"], type(config["lora_alpha"])) == (4, int)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./gone"}, "model: there is no folder './gone'"),
        ({"model": "a/b/c"}, "model: there is no folder 'a/b/c'"),
        ({"data": "gone.jsonl"}, "data: 'gone.jsonl' is not there"),
        ({"eval_data": "gone.jsonl"}, "eval_data: 'gone.jsonl' is not there"),
        ({"max_length": 4096}, "max_length is 4096, but the model takes 128"),
        ({"max_steps": None, "warmup_steps": 3}, "warmup_steps is 3, but the run has only 3 steps"),
        ({"targets": ["q_porj"]}, "q_porj.*q_proj"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_step(
    recipe: Callable[..., Recipe], changes: dict[str, Any], message: str
) -> None:
    plan = recipe(**changes)
    with pytest.raises(LoraError, match=message):
        run(plan)
    assert not Path(plan.out).exists()


def test_an_adapter_is_not_overwritten_without_force(recipe: Callable[..., Recipe]) -> None:
    plan = recipe(max_steps=1)
    run(plan)
    old = tensors(plan.out)
    with pytest.raises(LoraError, match="already holds an adapter; give another folder, or --force"):
        run(recipe(max_steps=1, seed=5))
    assert same(tensors(plan.out), old)
    run(recipe(max_steps=1, seed=5), force=True)
    assert not same(tensors(plan.out), old)


def test_the_models_limit_is_the_default_length(recipe: Callable[..., Recipe], write_rows: Write) -> None:
    data = write_rows([*ROWS, {"prompt": "x", "completion": "far too long " * 200}], "long.jsonl")
    plan = recipe(data=data, max_steps=1)
    run(plan)
    record = json.loads((Path(plan.out) / "run.json").read_text())
    assert (record["max_length"], record["rows"], record["rows_too_long"]) == (128, 12, 1)


def test_nothing_of_transformers_own_is_printed(
    recipe: Callable[..., Recipe], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    level = logging.get_verbosity()
    run(recipe())
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    assert logging.get_verbosity() == level
