"""The second stage of a split sum, in a fixed order: no float atomics, the same bits every time."""

import triton
import triton.language as tl
from torch import Tensor

from .tuning import cdiv

BLOCK = 256  # elements a program


@triton.jit
def summed(partial_ptr, index, inside, size, splits, BLOCK: tl.constexpr):
    """Sum over s of partial[s, index], sixteen of them in flight at a time; partial (splits, size) fp32."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, splits, 16):
        s = (first + tl.arange(0, 16))[:, None]
        mask = (s < splits) & inside[None, :]
        total += tl.sum(tl.load(partial_ptr + s.to(tl.int64) * size + index[None, :], mask=mask, other=0.0), 0)
    return total


@triton.jit
def reduce_kernel(
    partial_ptr, scales_ptr, out_ptr, size, width, out_stride, splits, inv_keep,
    SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i, j] = (sum over s of partial[s, i, j]) * scales[j] * inv_keep; partial fp32 (splits, rows, width).

    Reads 4 bytes an element and split, mostly from L2, where the first stage has just left them.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = summed(partial_ptr, index, inside, size, splits, BLOCK)
    i, j = index // width, index % width
    if SCALED:
        total *= tl.load(scales_ptr + j, mask=inside, other=0.0) * inv_keep
    tl.store(out_ptr + i.to(tl.int64) * out_stride + j, total.to(out_ptr.dtype.element_ty), mask=inside)


def reduce_(out: Tensor, partial: Tensor, scales: Tensor | None = None, inv_keep: float = 1.0) -> Tensor:
    """Sum partial (S, rows, width) fp32 over S into out (rows, width), times scales (width,) where given."""
    splits, rows, width = partial.shape
    reduce_kernel[(cdiv(rows * width, BLOCK),)](
        partial, scales, out, rows * width, width, out.stride(0), splits, inv_keep,
        SCALED=scales is not None, BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    return out
