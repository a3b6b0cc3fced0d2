"""Which base an adapter was trained on: names and shapes of its targets, and a few dozen of their weights."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import LoraError
from .bounded import clip, parse

SAMPLES, MOST = 48, 1000
ROUNDED, REQUANTIZED = 0.3, 0.05  # how far apart two quantizations, and one done twice, may put the samples


class Weight(Protocol):
    """What is asked of a target's frozen weight."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def parameter(self) -> Tensor: ...
    @property
    def quantization(self) -> str | None: ...
    @property
    def label(self) -> str | None: ...
    def at(self, row: int, column: int) -> Tensor: ...


def fingerprint(weights: Mapping[str, Weight]) -> str:
    """JSON: a hash of names and shapes, dtype, quantization, and samples [module, row, column, value] of the targets.

    Weights on the meta device have no values to sample.
    """
    samples: list[list[Any]] = []
    names = list(weights)
    real = [name for name in names if not weights[name].parameter.is_meta]
    for i in range(SAMPLES if real else 0):
        name = real[i * len(real) // SAMPLES]
        rows, columns = weights[name].shape
        # Fixed but scattered places; multiplicative steps do not run along a row or a column.
        row, column = (i * 2654435761 + 12345) % rows, (i * 40503 + 6789) % columns
        samples.append([name, row, column, weights[name].at(row, column).item()])
    dtype = _name(torch.float32 if quantization(weights) else weights[names[0]].dtype) if names else None
    found = {"layout": layout(weights), "dtype": dtype, "quantisation": quantization(weights)}
    return json.dumps(found | {"samples": samples})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def quantization(weights: Mapping[str, Weight]) -> str | None:
    """How the targets are quantized, in a file's words: "nf4", "double-quantised nf4", "int8, nf4" where they differ;
    None where none is."""
    return ", ".join(sorted({label for weight in weights.values() if (label := weight.label)})) or None


def _known(recorded: str) -> dict[str, Any]:
    """What a header says of a base.

    Raises:
        LoraError: it is no fingerprint.
    """
    try:
        known = parse(recorded.encode(), finite=False)
        samples = [(name, row, column, float(value)) for name, row, column, value in known["samples"]]
        dtype = getattr(torch, known["dtype"]) if known["dtype"] else torch.float32
        if not isinstance(known["layout"], str) or not isinstance(known.get("quantisation"), (str, type(None))):
            raise TypeError("its layout and quantization are no texts")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or len(samples) > MOST:
            raise ValueError(f"a dtype that floats, and at most {MOST} samples are expected")
        if not all(isinstance(n, str) and type(r) is type(c) is int and min(r, c) >= 0 for n, r, c, _ in samples):
            raise TypeError("a sample is a module's name, a row, a column and a value")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise LoraError(f"lora.base is no record of a base ({clip(error, 200)}); save the adapter again") from None
    return {**known, "samples": samples, "dtype": dtype}


def other_quantization(recorded: str, weights: Mapping[str, Weight]) -> tuple[str, str] | None:
    """(recorded, present) in words, where the base was quantized otherwise than this one; None where they agree."""
    known = _known(recorded)
    there, here = known.get("quantisation"), quantization(weights)
    if there == here or not weights:
        return None
    here = here or f"{_name(next(iter(weights.values())).dtype)}, not quantized"
    there = there or f"{_name(known['dtype'])}, not quantized"
    return clip(there.replace("quantised", "quantized")), here.replace("quantised", "quantized")


def layout(weights: Mapping[str, Weight]) -> str:
    return hashlib.sha256(json.dumps({n: weights[n].shape for n in sorted(weights)}).encode()).hexdigest()


def difference(recorded: str, weights: Mapping[str, Weight]) -> str | None:
    """What tells this base from the recorded one; None when they agree to within the coarser dtype's rounding."""
    known = _known(recorded)
    if known["layout"] != layout(weights):
        return "its targets have other names or shapes"
    if known.get("quantisation") != quantization(weights) and apart(recorded, weights) < ROUNDED:
        return None
    samples = _samples(known, weights)
    missed = [
        f"{place} is {float(here):.6g}, was {value:.6g}"
        for place, here, value in samples
        if not _same(here, value, known["dtype"])
    ]
    return f"{len(missed)} of {len(samples)} sampled weights differ, such as {missed[0]}" if missed else None


def apart(recorded: str, weights: Mapping[str, Weight]) -> float:
    """The distance of the samples here from the recorded ones, over the norm of those; infinite of other targets.

    A quantization moves them by 1 % in int8 and 10 % in 4 bits. The same quantization from another dtype or on another
    device moves a few by one step: 2 %. Two bases that have nothing to do with each other are 140 % apart.
    """
    known = _known(recorded)
    pairs = [(float(here), value) for _, here, value in _samples(known, weights)]
    norm = math.hypot(*(there for _, there in pairs))
    gap = math.hypot(*(here - there for here, there in pairs))
    found = gap / norm if norm else float(gap > 0)
    return math.inf if known["layout"] != layout(weights) or math.isnan(found) else found


def _samples(known: dict[str, Any], weights: Mapping[str, Weight]) -> list[tuple[str, Tensor, float]]:
    """(place, value here, value recorded) of each sample whose weight is here."""
    return [
        (f"{name}[{row}, {column}]", weights[name].at(row, column).detach(), value)
        for name, row, column, value in known["samples"]
        if name in weights and row < weights[name].shape[0] and column < weights[name].shape[1]
        if not weights[name].parameter.is_meta
    ]


def _same(here: Tensor, value: float, dtype: torch.dtype) -> bool:
    """The same bits in the same dtype; in another, equal up to one rounding to each of the two."""
    found = here.item()
    if found != found or value != value:
        return found != found and value != value
    if here.dtype == dtype:
        return found == value
    infos = [torch.finfo(kind) for kind in (here.dtype, dtype)]
    tolerance = sum(max(info.eps / 2 * abs(value), info.smallest_normal * info.eps) for info in infos)
    return bool(abs(found - value) <= tolerance)
