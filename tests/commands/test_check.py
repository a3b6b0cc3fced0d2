"""`lora check`: what a run asked of its adapter at the end, asked again by the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from command_line import Lora, runner
from lora.train import Recipe, run
from lora.train.base import load_base
from tiny_base import save_tiny_base

ROWS = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))} for n in range(2, 14)]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lora:
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe of a run that passed its own check."""
    folder = tmp_path_factory.mktemp("checked")
    save_tiny_base(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    recipe = Recipe.of(
        model=str(folder / "base"), data=str(folder / "rows.jsonl"), out=str(folder / "out"), r=16, alpha=32,
        targets="all-linear", max_steps=40, batch_size=12, lr=0.02, dtype="fp32", samples=0,
    )  # fmt: skip
    found = run(recipe)
    assert [line.split(": ")[1] for line in found.lines[-3:]] == ["ok", "ok", "ok"], found.lines
    return recipe


def arguments(recipe: Recipe, adapter: Any = None) -> list[str]:
    return ["check", str(adapter or recipe.out), "--model", recipe.model, "--data", recipe.data, "--dtype", "fp32"]


def test_what_passed_at_the_end_of_the_run_passes_later(cli: Lora, trained: Recipe) -> None:
    code, out, err = cli(*arguments(trained), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)["lines"]
    assert [line["verdict"] for line in found] == ["ok", "ok", "ok"]
    assert found[0]["text"].endswith("to the bit")
    assert json.loads(Path(trained.out, "run.json").read_text())["outcome"]["lines"][2]["verdict"] == "ok"


def test_an_adapter_that_makes_the_rows_worse_ends_in_6(cli: Lora, trained: Recipe, tmp_path: Path) -> None:
    model = load_base(trained.model, torch.float32)
    lora.load(model, trained.out)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".A"):
                parameter.mul_(-1)  # the update is taken away instead of added
    lora.save(model, tmp_path)
    (tmp_path / "run.json").write_bytes(Path(trained.out, "run.json").read_bytes())
    code, out, err = cli(*arguments(trained, tmp_path))
    assert code == 6
    assert "read back: failed" in out and "loss: failed" in out
    assert "did not pass its check" in err


def test_without_a_record_the_logits_are_not_judged(cli: Lora, trained: Recipe, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(Path(trained.out, name).read_bytes())
    code, out, _ = cli(*arguments(trained, tmp_path))
    assert code == 0 and "read back: not judged" in out


@pytest.mark.parametrize("probe", [[], {"ids": [1]}, {"ids": "x", "sha256": 1, "top": [], "dtype": 1, "device": 2}])
def test_a_probe_that_is_none_is_refused(cli: Lora, trained: Recipe, tmp_path: Path, probe: Any) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(Path(trained.out, name).read_bytes())
    (tmp_path / "run.json").write_text(json.dumps({"probe": probe}))
    code, out, err = cli(*arguments(trained, tmp_path))
    assert (code, out) == (2, "")
    assert "the probe in its run.json is no such record" in err
