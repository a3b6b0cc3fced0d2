"""Merging into a plain matrix, in place, and the exact way back.

W = round(W0 + D)      D in float64, rounded to fp32 once; the sum in fp32, rounded once
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bases import FrozenWeight
from ..ops import summed_bias
from ..updates import Change, Update, change
from .patch import Digest, Patch, row_blocks
from .report import MergedModule, kept_and_noise, moments
from .undo import Plain, changed, refuse_overflow

Rows = list[tuple[slice, Tensor]]


@dataclass
class DenseUndo(Plain):
    """What turns a merged matrix back: patches by row block, the checksum of W0's and W's bits, the factors that the
    updates gave W0's rows, the bias before and after."""

    dtype: torch.dtype
    digest: int
    patches: list[Patch]
    scales: list[Tensor | None]
    bias: Tensor | None
    merged_bias: Tensor | None

    @property
    def nbytes(self) -> int:
        kept = [t.nbytes for t in (self.bias, self.merged_bias, *self.scales) if t is not None]
        return sum(patch.nbytes for patch in self.patches) + sum(kept)


@torch.no_grad()
def merge_dense(
    name: str, host: nn.Module, weight: FrozenWeight, updates: tuple[Update, ...]
) -> tuple[MergedModule, DenseUndo]:
    """Fold the updates into the host's weight and bias."""
    old_weight = weight.dense()
    dtype = old_weight.dtype
    scales = [update.output_scale(weight, torch.float64) for update in updates]
    made = change(updates, scales)
    digest, patches = Digest(), []
    old_rows: Rows = []
    new_rows: Rows = []
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in row_blocks(weight.shape):
        old = old_weight[rows].clone(memory_format=torch.contiguous_format)
        delta = made.delta(rows, old, torch.promote_types(dtype, torch.float32))
        new = (old + delta).to(dtype)
        refuse_overflow(name, new)
        digest.add(old)
        digest.add(new)
        patches.append(Patch(old, _way_back(rows, new, made)))
        old_rows.append((rows, old))
        new_rows.append((rows, new))
        sums += moments(new.to(delta.dtype) - old, delta)
    old_bias = new_bias = None
    if any(update.bias is not None for update in updates):
        old_bias = host.get_parameter("bias").detach().clone()
        new_bias = summed_bias(old_bias, updates)
        refuse_overflow(name, new_bias)
    _write_all(host, weight, new_rows, new_bias, otherwise=(old_rows, old_bias))
    undo = DenseUndo(dtype, digest.value, patches, scales, old_bias, new_bias)
    return MergedModule(name, weight.shape, dtype, *kept_and_noise(sums)), undo


@torch.no_grad()
def unmerge_dense(
    name: str, host: nn.Module, weight: FrozenWeight, updates: tuple[Update, ...], undo: DenseUndo
) -> None:
    """Give the host W0 and its bias back, to the bit. Raises LoraError where something changed since the merge."""
    merged, made = weight.dense(), change(updates, undo.scales)
    bias = host._parameters.get("bias")
    digest = Digest()
    old_rows: Rows = []
    new_rows: Rows = []
    same_bias = undo.merged_bias is None or (bias is not None and torch.equal(bias, undo.merged_bias.to(bias.device)))
    if merged.dtype == undo.dtype and same_bias:
        for rows, patch in zip(row_blocks(weight.shape), undo.patches, strict=True):
            new = patch.apply_(_way_back(rows, merged[rows], made))
            old_rows.append((rows, merged[rows].clone(memory_format=torch.contiguous_format)))
            digest.add(new)
            digest.add(old_rows[-1][1])
            new_rows.append((rows, new))
    if digest.value != undo.digest:
        raise changed(name, merged.dtype, undo.dtype)
    _write_all(host, weight, new_rows, undo.bias, otherwise=(old_rows, undo.merged_bias))


def _way_back(rows: slice, merged: Tensor, made: Change) -> Tensor:
    """W0 but for a few places, contiguous. In float64, where the last bits of the update depend on the order of
    summation, W itself: the patch then holds W0 whole."""
    back = merged if merged.dtype == torch.float64 else made.origin(rows, merged)
    return back.clone(memory_format=torch.contiguous_format)


def _write_all(
    host: nn.Module, weight: FrozenWeight, rows: Rows, bias: Tensor | None, otherwise: tuple[Rows, Tensor | None]
) -> None:  # fmt: skip
    """Write the rows of the weight and the bias; where that fails or is interrupted, write the other ones back."""
    try:
        if bias is not None:
            host.get_parameter("bias").copy_(bias)
        for place, values in rows:
            weight.write_(place, values)
    except BaseException:
        if otherwise[1] is not None:
            host.get_parameter("bias").copy_(otherwise[1])
        for place, values in otherwise[0]:
            weight.write_(place, values)
        raise
