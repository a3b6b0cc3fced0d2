"""A classifier's held-out rows, measured on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..data.encode import Encoded
from .classify import accuracy_f1, class_logits
from .evaluations import HeldOut
from .recipe import Recipe
from .rows import RunRows


@dataclass(frozen=True)
class HeldOutLabels:
    """What `Evaluations` asks of held-out rows, for rows of a text and its label."""

    rows: Sequence[Encoded]
    pad: int
    batch_size: int

    def measure(self, model: Any) -> dict[str, float]:
        """`eval_loss`, a mean over the rows, and `accuracy` and `f1` in per cent."""
        logits = class_logits(model, self.rows, self.pad, self.batch_size)
        right = torch.tensor([row["labels"][0] for row in self.rows])
        scores = accuracy_f1(logits.argmax(-1).tolist(), right.tolist())
        return {"eval_loss": float(cross_entropy(logits, right)), **scores}

    def sampled(self, model: Any) -> list[dict[str, Any]]:
        """None: a label is no text to read."""
        return []


def held_out_of(recipe: Recipe, rows: RunRows, pad: int) -> HeldOut | HeldOutLabels | None:
    """How a run's held-out rows are measured; None where it has none."""
    if not rows.measured:
        return None
    if rows.template is None:
        return HeldOutLabels(rows.measured, pad, recipe.batch_size)
    return HeldOut(rows.measured, rows.template, recipe.batch_size, recipe.samples)
