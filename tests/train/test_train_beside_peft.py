"""`lora train` beside PEFT under transformers' Trainer, from the same A, rows, order and settings."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tiny_base import ROOT, save_tiny_base

ROWS = [{"prompt": f"count {n}", "completion": " ".join(map(str, range(1 + n % 17)))} for n in range(1, 81)]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import curve_beside_peft

    monkeypatch.setitem(sys.modules, "curve_beside_peft", curve_beside_peft)
    return curve_beside_peft


def apart(beside: ModuleType, folder: Path, steps: int, group: bool) -> float:
    """How far the two curves are from one another at most."""
    base = save_tiny_base(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    recipe = beside.recipe_of(
        str(base), str(folder / "rows.jsonl"), folder, max_steps=steps, group_by_length=group, lr=1e-2
    )
    ours = torch.tensor(beside.losses_of_ours(recipe), dtype=torch.float64)
    theirs = torch.tensor(beside.losses_of_peft(recipe, folder), dtype=torch.float64)
    assert len(ours) == len(theirs) == steps
    assert ours[-5:].mean() < 0.9 * ours[:5].mean()  # it has learned, so that the curves could have parted
    return float((ours - theirs).abs().max())


def test_the_loss_curve_is_that_of_peft_and_trainer(beside: ModuleType, tmp_path: Path) -> None:
    assert apart(beside, tmp_path, 20, group=True) <= 1e-4  # two passes


@pytest.mark.slow
@pytest.mark.parametrize("group", [True, False])
def test_the_loss_curve_is_that_of_peft_and_trainer_over_200_steps(
    beside: ModuleType, tmp_path: Path, group: bool
) -> None:
    assert apart(beside, tmp_path, 200, group) <= 1e-3
