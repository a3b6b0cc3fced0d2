"""A run's adapter, examined as it lies on the disk: `outcome.check` with the run's own base and rows."""

from pathlib import Path
from typing import Any

from torch import tensor
from torch.nn.functional import cross_entropy

from ..data.encode import Encoded
from .adapted import fresh_base
from .classify import class_logits, pad_id
from .length import Length
from .outcome import Material, Outcome, check, spend
from .probe import Probe
from .recipe import Recipe
from .rows import RunRows


def examined(recipe: Recipe, folder: Path, model: Any, rows: RunRows, length: Length) -> tuple[Outcome, Probe]:
    """What the check of a finished run found, and the probe by which a later one can ask the same.

    The trained model gives its memory up for the fresh base: it cannot be used any more.
    """
    held_out = bool(rows.measured)
    asked = rows.measured if held_out else rows.encoded.rows
    probe, device = Probe.of(model, asked[0]["input_ids"]), model.device
    spend(model)

    def load() -> Any:
        base = fresh_base(recipe, rows.names, rows.tokenizer)
        return base if getattr(base, "is_quantized", False) else base.to(device)

    seen = round(length.steps / length.per_pass * len(rows.encoded.rows))
    called = "held-out rows" if held_out else "training rows"
    loss = None if rows.template is not None else label_loss
    material = Material(
        rows.encoded.rows, asked, rows.template, seen, asked_called=called, loss=loss, held_out=rows.measured
    )
    return check(folder, load, probe, material), probe


def label_loss(model: Any, row: Encoded) -> float:
    """The loss of a classifier on one row."""
    return float(cross_entropy(class_logits(model, [row], pad_id(model, None)), tensor([row["labels"][0]])))
