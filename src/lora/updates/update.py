"""An update: what one adapter holds on one host, seen as a change of the host's frozen weight.

    W = c * (W0 + sum of s B A)        A: (r, in)  B: (out, r)  W0: (out, in), frozen  c: (out,), a factor for each row

A merge, the fused operator and the plain path read an update through `pairs` and `output_scale` alone; how the parts
of several updates add up stands in `Change`. A new update is a subclass and `register`; `LoraConfig.update` picks it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..bases import FrozenWeight
from ..errors import LoraError, near
from ..ops import low_rank_product

Pair = tuple[Tensor, Tensor, float]
"""A (r, in), B (out, r) and the number s of one low-rank term s B A."""


class Start(NamedTuple):
    """What a fresh update is made from.

    r, scaling, dropout: of this module. init: how A and B start, "gaussian" or "kaiming"; None: a file will fill them.
    zero: the half that starts at zero, "B", or "A" where the columns of A belong to single tokens.
    """

    r: int
    scaling: float
    dropout: float
    init: str | None
    zero: str = "B"


UpdateT = TypeVar("UpdateT", bound="Update")


class Update(nn.Module):
    """One adapter's part on one host. Its parameters are fp32 masters, its `bias` the trained copy of the host's."""

    name: ClassVar[str]  # LoraConfig.update
    note: ClassVar[str] = ""  # what the summary calls it beside its module
    scales: ClassVar[bool] = False  # whether `output_scale` gives a factor
    scaling: float
    dropout: float
    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias", None)

    @classmethod
    def fresh(cls: type[UpdateT], weight: FrozenWeight, start: Start) -> UpdateT:
        """A new part for a weight, on its device, that changes nothing yet.

        One that a file will fill is never on the meta device, so that an adapter can come before its base's weights.
        """
        raise NotImplementedError

    def pairs(self) -> Sequence[Pair]:
        """The low-rank terms that act, at least one; a term that never acts may have an A and a B of zeros."""
        raise NotImplementedError

    def output_scale(self, weight: FrozenWeight, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """c (out,) in dtype, differentiable where it trains; None where it is 1. A merge asks in float64, where c stays
        1 in the rows that act with 1."""
        return None

    def shift(self, bias: Tensor | None) -> Tensor | None:
        """What it adds to the host's bias (out,), fp32, beside a `bias` of its own; None where it adds nothing. What
        it adds is not merged."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it. The kind of host has keys for "A", "B" and "bias"; other names are keys already."""
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None}

    @property
    def r(self) -> int:
        """The ranks of all its terms."""
        return sum(A.shape[0] for A, _, _ in self.pairs())


class Change:
    """What updates make of W0 together, scale * W0 + sum of s B A, since their changes add:

        sum of (c (W0 + U) - W0) + W0 = (1 + sum of (c - 1)) W0 + sum of c U        U = sum of s B A

    scale: (out,), or None for 1. pairs: those of each update in turn, with its own scale within B.

    Args:
        scales: c (out,) of each update, or None, as `output_scale` gave it for this W0.
    """

    def __init__(self, updates: Sequence[Update], scales: Sequence[Tensor | None]) -> None:
        self.scale: Tensor | None = None
        self.pairs: list[list[Pair]] = []
        for update, c in zip(updates, scales, strict=True):
            self.pairs.append([(A, B if c is None else B * c.to(B.device)[:, None], s) for A, B, s in update.pairs()])
            if c is not None:
                self.scale = c if self.scale is None else self.scale + (c - 1)

    def delta(self, rows: slice, old: Tensor, dtype: torch.dtype) -> Tensor:
        """D[rows] (n, in) for `old`, W0[rows]: summed in float64 and rounded once to dtype; W0 + D is the sum."""
        scale, added = self._at(rows, old.device)
        return (added if scale is None else added + old.double() * (scale - 1)).to(dtype)

    def origin(self, rows: slice, merged: Tensor) -> Tensor:
        """About W0[rows] from the merged rows, in their dtype: the inverse of the change but for rounding. In float64,
        where the last bits of the update depend on the order of summation, the merged rows again."""
        if merged.dtype == torch.float64:
            return merged.clone()
        scale, added = self._at(rows, merged.device)
        if scale is None:
            return (merged - added.float()).to(merged.dtype)  # in fp32 as the merge itself, so that few places miss
        return ((merged.double() - added) / scale.masked_fill(scale == 0, 1)).to(merged.dtype)

    def _at(self, rows: slice, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """The scale (n, 1) or None, and the sum of s B A (n, in), float64, of some rows."""
        pairs = [(A.to(device), B.to(device), s) for pairs in self.pairs for A, B, s in pairs]
        scale = None if self.scale is None else self.scale[rows, None].to(device)
        return scale, low_rank_product(pairs, rows, torch.float64)


_UPDATES: dict[str, type[Update]] = {}


def register(update: type[UpdateT]) -> type[UpdateT]:
    """Add an update to those that `LoraConfig.update` can name; as a decorator.

    Raises:
        LoraError: another has that name.
    """
    if _UPDATES.get(update.name, update) is not update:
        raise LoraError(f"update: the name {update.name!r} is taken by {_UPDATES[update.name].__qualname__}")
    _UPDATES[update.name] = update
    return update


def unregister(update: type[Update]) -> None:
    """Take it out of the table again; adapters that hold it stay as they are."""
    _UPDATES.pop(update.name, None)


def update_named(name: Any) -> type[Update]:
    """Raises LoraError where there is none of that name."""
    if name not in _UPDATES:
        raise LoraError(f"update: got {name!r}{near(str(name), _UPDATES)}")
    return _UPDATES[name]
