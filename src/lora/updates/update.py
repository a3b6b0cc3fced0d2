"""An update: what one adapter holds on one host, seen as a change of the host's frozen weight.

    W = c * (W0 + sum of s B A)        A: (r, in)  B: (out, r)  W0: (out, in), frozen  c: (out,), a factor for each row

A merge, the fused operator and the plain path read an update through `pairs` and `output_scale` alone; how the parts
of several updates add up stands in `change`. A new update is a subclass and `register`; `LoraConfig.update` picks it.
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
    scales: ClassVar[bool] = False  # whether `output_scale` gives a factor
    scaling: float
    dropout: float
    bias: Tensor | None

    @classmethod
    def fresh(cls: type[UpdateT], weight: FrozenWeight, start: Start) -> UpdateT:
        """A new part for a weight, on its device, that changes nothing yet.

        One that a file will fill is never on the meta device, so that an adapter can come before its base's weights.
        """
        raise NotImplementedError

    def pairs(self) -> Sequence[Pair]:
        """The low-rank terms that act."""
        raise NotImplementedError

    def output_scale(self, weight: FrozenWeight, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """c (out,) in dtype, differentiable where it trains; None where it is 1. A merge asks in float64."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it. The kind of host has keys for "A", "B" and "bias"; other names are keys already."""
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None}

    @property
    def r(self) -> int:
        """The ranks of all its terms."""
        return sum(A.shape[0] for A, _, _ in self.pairs())


class Change(NamedTuple):
    """What updates make of some rows of W0: `scale` * W0 + `added`, in float64; `scale` (n, 1), or None for 1."""

    scale: Tensor | None
    added: Tensor

    def delta(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """D (n, in), rounded once to dtype, for which W0 + D is the changed weight."""
        if self.scale is None:
            return self.added.to(dtype)
        return (rows.double() * (self.scale - 1) + self.added).to(dtype)

    def origin(self, merged: Tensor, dtype: torch.dtype) -> Tensor:
        """About W0, in dtype, from the merged rows: the inverse of the change but for rounding."""
        if self.scale is None:
            # In fp32 as the merge itself, so that few places miss.
            return (merged - self.added.to(torch.promote_types(dtype, torch.float32))).to(dtype)
        return ((merged.double() - self.added) / self.scale.masked_fill(self.scale == 0, 1)).to(dtype)


def change(updates: Sequence[Update], scales: Sequence[Tensor | None], rows: slice, device: torch.device) -> Change:
    """What updates make of W0[rows] together: their changes add.

        sum of (c (W0 + U) - W0) + W0 = (1 + sum of (c - 1)) W0 + sum of c U        U = sum of s B A

    Args:
        scales: c (out,) in float64 of each update, or None, as `output_scale` gave it for this W0.
    """
    total: Tensor | None = None
    scale: Tensor | None = None
    for update, c in zip(updates, scales, strict=True):
        pairs = [(A.to(device), B.to(device), s) for A, B, s in update.pairs()]
        added = low_rank_product(pairs, rows, torch.float64)
        if c is not None:
            c = c[rows, None].to(device)
            added = added * c
            scale = c if scale is None else scale + (c - 1)
        total = added if total is None else total.add_(added)
    assert total is not None
    return Change(scale, total)


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
