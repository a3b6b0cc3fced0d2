"""What the backward pass reads dy for beside its large product: g = s dy B and dB = dy^T h, in one read of dy."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduce import BLOCK, summed
from .tuning import Config, cdiv, gradients_config, precision


@triton.jit
def gradients_kernel(
    dy_ptr, h_ptr, b_ptr, g_ptr, out_ptr,
    n, columns, rank, dy_stride, h_stride, b_stride, slab,
    EVEN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """g[c] = dy_c B_c for BC columns c, and out[s] = dy_s^T h_s for one slab s of rows: a program has one c and one s.

    dy (n, N), h (n, R), B (N, R); g (N / BC, n, R) and out (slabs, N, R) in fp32. Reads 2 n N bytes and writes
    4 R (n N / BC + N slabs): at 8192 x 4096 and r = 16 67 MB and 8 MB, which the second stage finds in L2.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    cols = block * BC + tl.arange(0, BC)
    ranks = tl.arange(0, BR)
    rank_mask = ranks[None, :] < rank
    thin_mask = rank_mask & (cols[:, None] < columns)
    at = cols[:, None].to(tl.int64)
    b = tl.load(b_ptr + at * b_stride + ranks[None, :], mask=thin_mask, other=0.0)
    acc = tl.zeros((BC, BR), tl.float32)
    for start in tl.range(split * slab, tl.minimum(split * slab + slab, n), BM):
        rows = (start + tl.arange(0, BM))[:, None]
        row_mask = rows < n
        mask = row_mask if EVEN else row_mask & (cols[None, :] < columns)
        dy = tl.load(dy_ptr + rows.to(tl.int64) * dy_stride + cols[None, :], mask=mask, other=0.0)
        h = tl.load(h_ptr + rows.to(tl.int64) * h_stride + ranks[None, :], mask=row_mask & rank_mask, other=0.0)
        acc = tl.dot(tl.trans(dy), h, acc, input_precision=PRECISION)
        g = tl.dot(dy, b, input_precision=PRECISION)
        tl.store(g_ptr + (block.to(tl.int64) * n + rows) * rank + ranks[None, :], g, mask=row_mask & rank_mask)
    out = out_ptr + (split.to(tl.int64) * columns + at) * rank + ranks[None, :]
    tl.store(out, acc, mask=thin_mask)


@triton.jit
def finish_kernel(
    g_partial_ptr, dB_partial_ptr, scales_ptr, g_ptr, dB_ptr,
    g_size, dB_size, rank, g_stride, blocks, splits, g_programs, inv_keep,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Both second stages in one launch: the first programs sum and scale g (n, R), the others sum dB (N, R)."""
    program = tl.program_id(0)
    if program < g_programs:
        index = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < g_size
        row, r = index // rank, index % rank
        total = summed(g_partial_ptr, index, inside, g_size, blocks, BLOCK)
        total *= tl.load(scales_ptr + r, mask=inside, other=0.0) * inv_keep
        tl.store(g_ptr + row * g_stride + r, total.to(g_ptr.dtype.element_ty), mask=inside)
    else:
        index = (program - g_programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < dB_size
        total = summed(dB_partial_ptr, index, inside, dB_size, splits, BLOCK)
        tl.store(dB_ptr + index, total, mask=inside)


def gradients_(
    g: Tensor, dB: Tensor, dy: Tensor, h: Tensor, b: Tensor, scales: Tensor, inv_keep: float,
    config: Config | None = None,
) -> None:  # fmt: skip
    """Write scales * inv_keep * dy b into g (n, R), of any row stride, and dy^T h into dB (N, R) fp32, contiguous.

    Args:
        dy: (n, N), unit column stride; h: (n, R), b: (N, R), unit column stride; scales: (R,) fp32.
    """
    (n, columns), rank = dy.shape, b.shape[1]
    if n == 0:
        dB.zero_()
        return
    config = config or gradients_config(dy, rank)
    bm, bc, br = config["BM"], config["BC"], config["BR"]
    blocks = cdiv(columns, bc)
    slab = cdiv(cdiv(n, max(1, config["programs"] // blocks)), bm) * bm
    splits = cdiv(n, slab)
    g_partial = torch.empty(blocks, n, rank, device=dy.device, dtype=torch.float32)
    dB_partial = torch.empty(splits, columns, rank, device=dy.device, dtype=torch.float32)
    gradients_kernel[blocks, splits](
        dy, h, b, g_partial, dB_partial,
        n, columns, rank, dy.stride(0), h.stride(0), b.stride(0), slab,
        EVEN=columns % bc == 0, BM=bm, BC=bc, BR=br, PRECISION=precision(dy),
        num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip
    g_programs = cdiv(n * rank, BLOCK)
    finish_kernel[(g_programs + cdiv(columns * rank, BLOCK),)](
        g_partial, dB_partial, scales, g, dB,
        n * rank, columns * rank, rank, g.stride(0), blocks, splits, g_programs, inv_keep,
        BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
