"""Runs of a few steps on a tiny base: the recipe, and faults put into a step."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from lora.train import Recipe
from lora.train.trainer import LoraTrainer

ROWS = [{"prompt": f"count {n}", "completion": " ".join(map(str, range(n)))} for n in range(1, 13)]


def recipe_of(base: Path, folder: Path, **changes: Any) -> Recipe:
    """Six steps of four rows with dropout, which saves at each second one."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    fields = {
        "model": str(base), "data": str(rows), "out": str(folder / "out"), "targets": ["q_proj", "v_proj"], "r": 4,
        "alpha": 8, "dropout": 0.1, "max_steps": 6, "batch_size": 4, "lr": 1e-2, "dtype": "fp32", "save_every": 2,
        "check": False, "samples": 0,
    }  # fmt: skip
    return Recipe.of(**{**fields, **changes})


def tensors(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(one: Path | str, other: Path | str) -> bool:
    """Whether two adapters have the same bits."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def curve(folder: Path | str) -> list[tuple[float, ...]]:
    """(step, loss, rate, gradient norm, tokens) of each step in metrics.jsonl."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [tuple(x[key] for key in ("step", "loss", "lr", "grad_norm", "tokens")) for x in lines if "loss" in x]


@contextmanager
def at_batches(does: Callable[[int, Any], Any]) -> Iterator[None]:
    """Within it, `does(number, loss)` stands between each micro-batch's loss (counted from 1) and its backward pass."""
    compute, count = LoraTrainer.compute_loss, iter(range(1, 10_000))

    def instead(self: Any, *args: Any, **kwargs: Any) -> Any:
        return does(next(count), compute(self, *args, **kwargs))

    with patch.object(LoraTrainer, "compute_loss", instead):
        yield


def not_a_number(*batches: int, only_gradient: bool = False) -> Callable[[int, Any], Any]:
    """The loss of these batches is NaN; or its gradient alone: sqrt's slope at 0 is infinite, and 0 * inf is NaN."""

    def does(number: int, loss: Any) -> Any:
        if number not in batches:
            return loss
        return loss + (loss * 0).sqrt() if only_gradient else loss * math.nan

    return does
