"""Merging into a plain matrix, in place, and the exact way back.

W = round(W0 + D)      D in float64, rounded to fp32 once; the sum in fp32, rounded once
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..bases import FrozenWeight
from ..ops import summed_bias
from ..updates import Change, Update
from .patch import Digest, Patch, row_blocks
from .report import MergedModule, kept_and_noise, moments
from .undo import Journal, Undo, changed, refuse_overflow

Blocks = list[tuple[slice, Tensor, Tensor]]  # rows of the weight, before and after
Biases = tuple[Tensor | None, Tensor | None]
Values = tuple[Blocks, Biases]  # all that is written


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
    name: str, host: nn.Module, weight: FrozenWeight, updates: tuple[Update, ...], journal: Journal
) -> tuple[MergedModule, DenseUndo]:
    """Fold the updates into the host's weight and bias."""
    values, report, undo = _merged(name, host, weight, updates)
    _write(host, weight, values, journal, partial(_unmerged, name, host, weight, updates, undo))
    return report, undo


@torch.no_grad()
def unmerge_dense(
    name: str, host: nn.Module, weight: FrozenWeight, updates: tuple[Update, ...], undo: DenseUndo, journal: Journal
) -> None:
    """Give the host W0 and its bias back, to the bit. Raises LoraError where something changed since the merge."""
    values = _unmerged(name, host, weight, updates, undo)
    _write(host, weight, values, journal, lambda: _merged(name, host, weight, updates)[0])


def _merged(
    name: str, host: nn.Module, weight: FrozenWeight, updates: tuple[Update, ...]
) -> tuple[Values, MergedModule, DenseUndo]:
    """What a merge writes, says and remembers."""
    dtype = weight.dtype
    scales = [update.output_scale(weight, torch.float64) for update in updates]
    made, digest, patches = Change(updates, scales), Digest(), []
    blocks: Blocks = []
    sums = torch.zeros(3, dtype=torch.float64)
    for rows, old, delta, new in _summed(name, weight, made):
        digest.add(old, new)
        patches.append(Patch(old, made.origin(rows, new)))
        blocks.append((rows, old, new))
        sums += moments(new.to(delta.dtype) - old, delta)
    biases = _summed_bias(name, host, updates)
    report = MergedModule(name, weight.shape, dtype, *kept_and_noise(sums))
    return (blocks, biases), report, DenseUndo(dtype, digest.value, patches, scales, biases)


def _summed(name: str, weight: FrozenWeight, made: Change) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(rows, W0, D, W) by blocks of rows."""
    dense, dtype = weight.dense(), weight.dtype
    for rows in row_blocks(weight.shape):
        old = dense[rows].clone(memory_format=torch.contiguous_format)
        delta = made.delta(rows, old, torch.promote_types(dtype, torch.float32))
        new = (old + delta).to(dtype)
        refuse_overflow(name, new)
        yield rows, old, delta, new


def _summed_bias(name: str, host: nn.Module, updates: tuple[Update, ...]) -> Biases:
    if all(update.bias is None for update in updates):
        return None, None
    old = host.get_parameter("bias").detach().clone()
    new = summed_bias(old, updates)
    assert new is not None
    refuse_overflow(name, new)
    return old, new


@torch.no_grad()
def sum_dense(name: str, host: nn.Module, weight: FrozenWeight, updates: tuple[Update, ...]) -> dict[str, Tensor]:
    """The host's weight, as it is stored, and its bias after a merge that is not done."""
    made = Change(updates, [update.output_scale(weight, torch.float64) for update in updates])
    matrix = torch.empty(weight.shape, dtype=weight.dtype, device=weight.parameter.device)
    for rows, _, _, new in _summed(name, weight, made):
        matrix[rows] = new
    stored, bias = weight.as_stored(matrix).contiguous(), _summed_bias(name, host, updates)[1]
    return {"weight": stored} if bias is None else {"weight": stored, "bias": bias}


def _unmerged(name: str, host: nn.Module, weight: FrozenWeight, updates: tuple[Update, ...], undo: DenseUndo) -> Values:
    """What an unmerge writes."""
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
    return blocks, (merged_bias, old_bias)


def _write(
    host: nn.Module, weight: FrozenWeight, values: Values, journal: Journal, others: Callable[[], Values]
) -> None:
    """Write the rows of the weight and the bias, so that the verb may still be taken back.

    While they are written the journal keeps what they were, and later only how that is computed: `others`.
    """
    journal[host] = partial(_put, host, weight, values, False)
    _put(host, weight, values, True)

    @torch.no_grad()
    def back() -> None:
        journal[host] = partial(_put, host, weight, others(), True)
        journal[host]()

    journal[host] = back


@torch.no_grad()
def _put(host: nn.Module, weight: FrozenWeight, values: Values, after: bool) -> None:
    blocks, biases = values
    bias = biases[after]
    if bias is not None:
        host.get_parameter("bias").copy_(bias)
    for rows, *both in blocks:
        weight.write_(rows, both[after])
