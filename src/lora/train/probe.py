"""What a trained model makes of one row, so that it can be asked of what was read back from disk."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .modes import evaluating

_TOKENS = 128  # of the row: its logits are kept, and a vocabulary is large
_TOP = 8  # logits of the last place that a record keeps by value
# By how much of the largest logit two computations of the same numbers may differ, by dtype. Within one dtype, device
# and set of kernels they do not differ; these are for other kernels, other devices and other sizes of a batch.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}


@dataclass(frozen=True)
class Difference:
    """Between two sets of logits: `exact` to the bit, or `most` of the largest one."""

    exact: bool
    most: float


@dataclass(frozen=True)
class Probe:
    """A row's tokens, and its logits as `record` keeps them; all of them (`logits`, on the CPU) in the run itself."""

    ids: list[int]
    sha256: str
    top: list[tuple[int, float]]
    dtype: str
    device: str
    logits: Tensor | None = None

    @classmethod
    def of(cls, model: Any, ids: Sequence[int]) -> "Probe":
        """The model's answer to a row, in eval mode."""
        ids = list(ids[:_TOKENS])
        logits = logits_of(model, ids)
        last = logits[-1] if logits.dim() == 2 else logits
        values, places = last.float().topk(min(_TOP, last.numel()))
        top = list(zip(places.tolist(), values.tolist(), strict=True))
        dtype = str(logits.dtype).removeprefix("torch.")
        return cls(ids, _digest(logits), top, dtype, model.device.type, logits)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Probe":
        """From `record`. Raises KeyError, TypeError or ValueError where it is none."""
        top = [(int(place), float(value)) for place, value in record["top"]]
        return cls(
            [int(i) for i in record["ids"]], str(record["sha256"]), top, str(record["dtype"]), str(record["device"])
        )

    def record(self) -> dict[str, Any]:
        """JSON, for a check in another process."""
        top = [[place, round(value, 6)] for place, value in self.top]
        return {"ids": self.ids, "sha256": self.sha256, "top": top, "dtype": self.dtype, "device": self.device}

    def difference(self, logits: Tensor) -> Difference:
        """How far these logits, of the same row, are from the probe's."""
        if _digest(logits) == self.sha256:
            return Difference(True, 0.0)
        if self.logits is not None:
            if logits.shape != self.logits.shape:
                return Difference(False, float("inf"))
            return Difference(False, apart(logits, self.logits))
        last = (logits[-1] if logits.dim() == 2 else logits).float()
        if max(place for place, _ in self.top) >= last.numel():
            return Difference(False, float("inf"))
        wanted = torch.tensor([value for _, value in self.top])
        return Difference(False, apart(last[[place for place, _ in self.top]], wanted))


@torch.no_grad()
def logits_of(model: Any, ids: Sequence[int]) -> Tensor:
    """(length, vocabulary) for a language model, (labels,) for a classifier; on the CPU."""
    row = torch.tensor([list(ids)], device=model.device)
    with evaluating(model):
        output = model(input_ids=row, attention_mask=torch.ones_like(row))
    logits: Tensor = output.logits[0].cpu()
    return logits


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value; infinite where one is not finite."""
    one, other = one.double(), other.double()
    if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def _digest(logits: Tensor) -> str:
    return hashlib.sha256(logits.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
