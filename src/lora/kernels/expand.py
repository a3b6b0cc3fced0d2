"""The low-rank part of dx under dropout, for the plan that leaves the large product to cuBLAS."""

import triton
import triton.language as tl
from torch import Tensor

from .mask import tile_mask
from .tuning import cdiv, power_of_two, precision


@triton.jit(do_not_specialize=["threshold"])
def expand_kernel(
    g_ptr, a_ptr, seed_ptr, out_ptr,
    n, columns, rank, g_stride, a_stride, out_stride, threshold,
    BM: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = mask * (g A), each program BM rows and 256 columns. g (n, R), A (R, K), out (n, K).

    Writes 2 n K bytes: 67 MB at 8192 x 4096.
    """
    group = tl.program_id(1)
    rows = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    cols = (group * 256 + tl.arange(0, 256))[None, :]
    row_mask = rows < n
    acc = tl.zeros((BM, 256), tl.float32)
    for r in tl.range(0, rank, BR):
        ranks = r + tl.arange(0, BR)
        g_mask = row_mask & (ranks[None, :] < rank)
        g = tl.load(g_ptr + rows.to(tl.int64) * g_stride + ranks[None, :], mask=g_mask, other=0.0)
        a_mask = (ranks[:, None] < rank) & (cols < columns)
        a = tl.load(a_ptr + ranks[:, None] * a_stride + cols, mask=a_mask, other=0.0)
        acc = tl.dot(g, a, acc, input_precision=PRECISION)
    acc = tl.where(tile_mask(rows, group, seed_ptr, threshold), acc, 0.0)
    out = out_ptr + rows.to(tl.int64) * out_stride + cols
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_mask & (cols < columns))


def expand_(out: Tensor, g: Tensor, a: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """Write mask * (g a) into out (n, K); g (n, R), a (R, K), unit column strides."""
    (n, columns), rank = out.shape, a.shape[0]
    if n == 0:
        return out
    expand_kernel[cdiv(n, 32), cdiv(columns, 256)](
        g, a, seed, out, n, columns, rank, g.stride(0), a.stride(0), out.stride(0), threshold,
        BM=32, BR=min(64, power_of_two(rank)), PRECISION=precision(g), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
