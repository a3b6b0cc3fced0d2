"""Merging into a quantized weight: a 16-bit linear in its place, or the sum quantized again.

The original weight is kept whole (it is a quarter or half of the 16-bit one), so unmerge gives back its very bytes.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import FrozenWeight, Quantized
from ..errors import LoraError, LoraWarning
from ..layers import LinearAdapters
from ..ops import summed_bias
from ..report import MergedModule
from .checks import changed, kept_and_noise, moments, refuse_overflow
from .patch import Digest

BLOCK = 1 << 22  # elements of a checksum at a time


@dataclass
class Replaced:
    """A quantized weight in whose place a merge put something else."""

    parameter: Any
    attributes: dict[str, Any]  # the module's, that belong to the parameter
    into: str | None
    bias: Tensor | None = None  # the bias parameter, where the merge put another in its place
    digest: int = 0  # of what the merge wrote and what it was made from, in these dtypes
    dtypes: list[torch.dtype] = field(default_factory=list)

    @property
    def merged_class(self) -> type[nn.Module] | None:
        """The module's class while merged; None for its own."""
        return nn.Linear if self.into is None else None


def merge_digest(host: nn.Module, adapters: LinearAdapters, undo: Replaced) -> int:
    """A checksum of a merged host's weight and bias, and of A and B, in the dtypes that they had at the merge: nothing
    of it may change before the unmerge."""
    digest = Digest()
    for tensor, dtype in zip(_written(host, adapters, undo), undo.dtypes, strict=True):
        for block in tensor.detach().to(dtype).reshape(-1).split(BLOCK):  # type: ignore[no-untyped-call]
            digest.add(block)
    return digest.value


def was_cast(host: nn.Module, adapters: LinearAdapters, undo: Replaced) -> bool:
    """Whether something of a merged host has another dtype than at the merge, so that its values cannot be known."""
    return [t.dtype for t in _written(host, adapters, undo)] != undo.dtypes


def _written(host: nn.Module, adapters: LinearAdapters, undo: Replaced) -> list[Tensor]:
    weight = [host._parameters["weight"]] if undo.into is None else adapters.frozen.stored()[0]
    found = [*weight, host._parameters["bias"], *(p for term in adapters.terms for p in term.parameters())]
    return [tensor for tensor in found if tensor is not None]


def check_unchanged(name: str, host: nn.Module, adapters: LinearAdapters) -> None:
    """Refuse to throw away what was done to a merged quantized layer; one that was cast can only be warned of."""
    if adapters.undo.digest == merge_digest(host, adapters, adapters.undo):
        return
    if not was_cast(host, adapters, adapters.undo):
        raise changed(name, adapters.frozen.parameter.dtype, None)
    warnings.warn(
        f"unmerge: {name!r} was cast while it was merged, so whether it also changed cannot be seen; its quantized "
        "weight is back to the bit",
        LoraWarning,
        stacklevel=2,
    )


def check_into(name: str, host: nn.Module, adapters: LinearAdapters, into: str | None) -> None:
    """Refuse what this host's weight cannot be merged into."""
    frozen = adapters.frozen
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
def merge_quantized(
    name: str, host: nn.Module, adapters: LinearAdapters, updates: Iterator[tuple[slice, Tensor]], into: str | None,
    dtype: torch.dtype | None,
) -> tuple[MergedModule, Replaced]:  # fmt: skip
    """W0 + D in fp32 from the dequantized W0, rounded once to `dtype` or quantized once; the module then holds that.

    Args:
        updates: (rows, D[rows]) over the rows, D in fp32.
        dtype: of a 16-bit layer; None is the weight's own: of the last call where it is int8, and fp16 before any.
    """
    frozen = adapters.frozen
    assert isinstance(frozen, Quantized)
    dtype = dtype or frozen.dtype
    before = frozen.dense(torch.float32)
    update = torch.empty_like(before)
    for rows, values in updates:
        update[rows] = values
    total = before + update
    undo = Replaced(frozen.parameter, frozen.attributes(), into)
    bias = host._parameters["bias"]
    new_bias = summed_bias(bias, adapters.terms)
    if new_bias is not None and into is None:
        new_bias = new_bias.to(dtype)  # a plain linear has one dtype
    try:
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
        kept, noise = kept_and_noise(moments(merged.float() - before, update))
        undo.dtypes = [t.dtype for t in _written(host, adapters, undo)]
        undo.digest = merge_digest(host, adapters, undo)
    except BaseException:
        put_back(host, frozen, undo)
        raise
    return MergedModule(name, frozen.shape, dtype, kept, noise, into), undo


@torch.no_grad()
def put_back(host: nn.Module, frozen: FrozenWeight, undo: Replaced) -> None:
    """Give a host its quantized weight again, on the device where it is now."""
    assert isinstance(frozen, Quantized)
    device = frozen.parameter.device
    frozen.install(undo.parameter, undo.attributes)
    if undo.bias is not None:
        host._parameters["bias"] = undo.bias  # type: ignore[assignment]  # the parameter that it was
        undo.bias.data = undo.bias.data.to(device)


def leave(host: nn.Module, adapters: LinearAdapters) -> None:
    """Before its adapters go for good: make a host that was merged into 16 bits a plain linear."""
    undo: Replaced = adapters.undo
    for attribute in undo.attributes:
        delattr(host, attribute)
    adapters.original, adapters.resting_layer = nn.Linear, None
