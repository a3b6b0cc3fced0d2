"""Merging into a plain matrix, in place, and the exact way back.

W = round(W0 + D)      D in float64, rounded to fp32 once; the sum in fp32, rounded once
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bases import FrozenWeight
from ..ops import summed_bias
from ..updates import Change, Update
from .patch import Digest, Patch, row_blocks
from .report import MergedModule, kept_and_noise, moments
from .undo import Undo, changed, refuse_overflow

Blocks = list[tuple[slice, Tensor, Tensor]]  # rows of the weight, before and after
Biases = tuple[Tensor | None, Tensor | None]


@dataclass
class DenseUndo(Undo):
    """What turns a merged matrix back: patches by row block, the checksum of W0's and W's bits, the factors that the
    updates gave W0's rows, the bias before and after."""

    dtype: torch.dtype
    digest: int
    patches: list[Patch]
    scales: list[Tensor | None]
    biases: Biases  # before and after

    @property
    def nbytes(self) -> int:
        kept = [t.nbytes for t in (*self.biases, *self.scales) if t is not None]
        return sum(patch.nbytes for patch in self.patches) + sum(kept)


@torch.no_grad()
def merge_dense(
    name: str, host: nn.Module, weight: FrozenWeight, updates: tuple[Update, ...]
) -> tuple[MergedModule, DenseUndo]:
    """Fold the updates into the host's weight and bias."""
    dense, dtype = weight.dense(), weight.dtype
    scales = [update.output_scale(weight, torch.float64) for update in updates]
    made, digest, patches = Change(updates, scales), Digest(), []
    blocks: Blocks = []
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in row_blocks(weight.shape):
        old = dense[rows].clone(memory_format=torch.contiguous_format)
        delta = made.delta(rows, old, torch.promote_types(dtype, torch.float32))
        new = (old + delta).to(dtype)
        refuse_overflow(name, new)
        digest.add(old, new)
        patches.append(Patch(old, made.origin(rows, new)))
        blocks.append((rows, old, new))
        sums += moments(new.to(delta.dtype) - old, delta)
    biases: Biases = (None, None)
    if any(update.bias is not None for update in updates):
        old_bias = host.get_parameter("bias").detach().clone()
        biases = old_bias, summed_bias(old_bias, updates)
        refuse_overflow(name, biases[1])
    _write_all(host, weight, blocks, biases)
    undo = DenseUndo(dtype, digest.value, patches, scales, biases)
    return MergedModule(name, weight.shape, dtype, *kept_and_noise(sums)), undo


@torch.no_grad()
def unmerge_dense(
    name: str, host: nn.Module, weight: FrozenWeight, updates: tuple[Update, ...], undo: DenseUndo
) -> None:
    """Give the host W0 and its bias back, to the bit. Raises LoraError where something changed since the merge."""
    dense, made, digest = weight.dense(), Change(updates, undo.scales), Digest()
    blocks: Blocks = []
    bias = host._parameters.get("bias")
    old_bias, merged_bias = undo.biases
    same_bias = merged_bias is None or (bias is not None and torch.equal(bias, merged_bias.to(bias.device)))
    if dense.dtype == undo.dtype and same_bias:
        for rows, patch in zip(row_blocks(weight.shape), undo.patches, strict=True):
            merged = dense[rows].clone(memory_format=torch.contiguous_format)
            old = patch.apply_(made.origin(rows, merged))
            digest.add(old, merged)
            blocks.append((rows, merged, old))
    if digest.value != undo.digest:
        raise changed(name, dense.dtype, undo.dtype)
    _write_all(host, weight, blocks, (merged_bias, old_bias))


def _write_all(host: nn.Module, weight: FrozenWeight, blocks: Blocks, biases: Biases) -> None:
    """Write the rows of the weight and the bias; where that fails or is interrupted, write back what they were."""

    def write(after: bool) -> None:
        bias = biases[after]
        if bias is not None:
            host.get_parameter("bias").copy_(bias)
        for rows, *values in blocks:
            weight.write_(rows, values[after])

    try:
        write(True)
    except BaseException:
        write(False)
        raise
