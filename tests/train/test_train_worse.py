"""A run that makes the model worse than it was: it is told, and the numbers are those of the adapter that is saved."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora.errors import CheckError, LoraWarning
from lora.train import Recipe, run
from tiny_base import save_tiny_base
from tiny_run import recipe_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def worse(base: Path, folder: Path, **changes: Any) -> Recipe:
    """Steps that are far too long, measured after each; it stops at the second, which is worse than the first."""
    fields = {
        "targets": ["gate_proj", "up_proj", "down_proj"], "alpha": 200, "lr": 1.0, "warmup_steps": 0, "seed": 2,
        "dropout": 0.0, "schedule": "constant", "eval_share": 0.3, "eval_every": 1, "early_stop": 1,
    }  # fmt: skip
    return recipe_of(base, folder, **{**fields, **changes})


def test_without_the_check_it_is_a_warning_and_the_loss_is_the_saved_adapters(base: Path, tmp_path: Path) -> None:
    with pytest.warns(LoraWarning, match="the adapter is worse than the base on the held-out rows"):
        found = run(worse(base, tmp_path))
    record = json.loads((found.out / "run.json").read_text())
    lines = [json.loads(line) for line in (found.out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert best < max(losses), losses
    assert (record["best_step"], record["adapter_step"]) == (best, best)
    assert found.metrics["eval_loss"] == record["metrics"]["eval_loss"] == losses[best]
    assert found.lines == [f"the adapter is that of step {best}, the best on the held-out rows"]


def test_with_the_check_it_fails_and_all_lines_are_told_before(base: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=400)
    further = {"targets": ["v_proj", "o_proj"], "seed": 0, "max_steps": 2, "early_stop": None}  # beyond its noise
    with pytest.raises(CheckError, match="loss: failed: .* held-out rows"):
        run(worse(base, tmp_path, **further, check=True), console=console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "read back: ok" in told and "stops: not judged" in told and "loss: failed" in told
