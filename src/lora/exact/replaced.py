"""Merging into a quantized weight: a 16-bit linear in its place, or the sum quantized again.

The original weight is kept whole (it is a quarter or half of the 16-bit one), so unmerge gives back its very bytes.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import FrozenWeight, Quantized
from ..errors import LoraError, LoraWarning
from ..ops import summed_bias
from ..updates import Change, Update
from .patch import Digest, row_blocks
from .report import MergedModule, kept_and_noise, moments
from .undo import How, Undo, changed, refuse_overflow


@dataclass
class Replaced(Undo):
    """A quantized weight in whose place a merge put something else."""

    parameter: Any
    attributes: dict[str, Any]  # the module's, that belong to the parameter
    bias: Tensor | None = None  # the bias parameter, where the merge put another in its place
    digest: int = 0  # of what the merge wrote and what it was made from, in these dtypes
    dtypes: list[torch.dtype] = field(default_factory=list)

    def leave(self, host: nn.Module) -> type[nn.Module]:
        """Before its adapters go for good: make a host that was merged into 16 bits a plain linear; its class."""
        for attribute in self.attributes:
            delattr(host, attribute)
        return nn.Linear


def check_into(name: str, frozen: FrozenWeight, into: str | None) -> None:
    """Refuse what a host's weight cannot be merged into."""
    if not isinstance(frozen, Quantized):
        return
    kind = frozen.quantization
    again = kind if kind in frozen.into else None
    if into not in (None, again):
        allowed = "None (a 16-bit layer)" if again is None else f"{again!r} and None (a 16-bit layer)"
        raise LoraError(f"into: got {into!r}, but the weight of {name!r} is {kind}; allowed are {allowed}")
    if into is None and (why := frozen.why_not_plain()):
        instead = "" if again is None else f"use into={again!r}, or "
        raise LoraError(f"model: {name!r} {why}; {instead}merge into the base loaded in 16 bits")


@torch.no_grad()
def merge_replaced(
    name: str, host: nn.Module, frozen: FrozenWeight, updates: tuple[Update, ...], how: How
) -> tuple[MergedModule, Replaced]:
    """W0 + D in fp32 from the dequantized W0, rounded once or quantized once; the module then holds that.

    Rounded to `how.dtype`, or without one to the weight's own: of the last call where it is int8, fp16 before any.
    """
    assert isinstance(frozen, Quantized)
    into, dtype = how.into, how.dtype or frozen.dtype
    before, delta = _change(frozen, updates)
    total = before + delta
    undo = Replaced(frozen.parameter, frozen.attributes(), into=into, merged_class=None if into else nn.Linear)
    bias = host._parameters.get("bias")
    new_bias = summed_bias(bias, updates)
    if new_bias is not None and into is None:
        new_bias = new_bias.to(dtype)  # a plain linear has one dtype
    if into is None:
        merged = total.to(dtype)
        before = before.to(dtype).float()  # what the base computes with
        frozen.install(nn.Parameter(merged, requires_grad=False), {})
    else:
        frozen.install(*frozen.quantized(total))
        merged = frozen.dense(torch.float32)
    for values in [merged] if new_bias is None else [merged, new_bias]:
        refuse_overflow(name, values, into)
    if new_bias is not None and new_bias is not bias:
        undo.bias = bias
        host._parameters["bias"] = nn.Parameter(new_bias.detach().clone(), requires_grad=False)
    kept, noise = kept_and_noise(moments(merged.float() - before, delta))
    written = _written(host, frozen, updates, into)
    undo.dtypes = [t.dtype for t in written]
    undo.digest = _digest(written, undo.dtypes)
    return MergedModule(name, frozen.shape, dtype, kept, noise, into), undo


def _change(frozen: Quantized, updates: tuple[Update, ...]) -> tuple[Tensor, Tensor]:
    """W0 and D, in fp32."""
    before = frozen.dense(torch.float32)
    delta = torch.empty_like(before)
    made = Change(updates, [update.output_scale(frozen, torch.float64) for update in updates])
    for rows in row_blocks(frozen.shape):
        delta[rows] = made.delta(rows, before[rows], torch.float32)
    return before, delta


@torch.no_grad()
def sum_replaced(
    name: str, host: nn.Module, frozen: FrozenWeight, updates: tuple[Update, ...], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The weight and the bias of the plain linear that a merge, which is not done, would put in the host's place."""
    assert isinstance(frozen, Quantized)
    dtype = dtype or frozen.dtype
    before, delta = _change(frozen, updates)
    found = {"weight": (before + delta).to(dtype)}
    if (bias := summed_bias(host._parameters.get("bias"), updates)) is not None:
        found["bias"] = bias.detach().to(dtype)
    for values in found.values():
        refuse_overflow(name, values)
    return found


def unmerge_replaced(
    name: str, host: nn.Module, frozen: FrozenWeight, updates: tuple[Update, ...], undo: Replaced
) -> None:
    """Give a host its quantized weight again. What was done to the merged layer is not thrown away: that is refused; of
    one that was cast, whose values cannot be known, it is said."""
    assert isinstance(frozen, Quantized)
    written = _written(host, frozen, updates, undo.into)
    if undo.digest != _digest(written, undo.dtypes):
        if [t.dtype for t in written] == undo.dtypes:
            raise changed(name, frozen.parameter.dtype, None)
        warnings.warn(
            f"unmerge: {name!r} was cast while it was merged, so whether it also changed cannot be seen; its quantized "
            "weight is back to the bit",
            LoraWarning,
            stacklevel=2,
        )
    _put_back(host, frozen, undo)


@torch.no_grad()
def _put_back(host: nn.Module, frozen: Quantized, undo: Replaced) -> None:
    """The quantized weight, on the device where the module is now."""
    device = frozen.parameter.device
    frozen.install(undo.parameter, undo.attributes)
    if undo.bias is not None:
        host._parameters["bias"] = undo.bias  # type: ignore[assignment]  # the parameter that it was
        undo.bias.data = undo.bias.data.to(device)


def _written(host: nn.Module, frozen: Quantized, updates: tuple[Update, ...], into: str | None) -> list[Tensor]:
    """A merged host's weight and bias, and A and B: nothing of it may change before the unmerge."""
    weight = [host._parameters["weight"]] if into is None else frozen.stored()[0]
    found = [*weight, host._parameters.get("bias"), *(p for update in updates for p in update.parameters())]
    return [tensor for tensor in found if tensor is not None]


def _digest(written: list[Tensor], dtypes: list[torch.dtype]) -> int:
    """The checksum of tensors in the dtypes that they had at the merge."""
    digest = Digest()
    for tensor, dtype in zip(written, dtypes, strict=True):
        digest.add(tensor.detach().to(dtype))
    return digest.value
