"""A tall product with a thin result: h = dropout(x) A^T, and g = dy B. Bound by one read of the tall operand."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mask import load_group
from .reduce import reduce_
from .tuning import Config, cdiv, precision, shrink_config


@triton.jit(do_not_specialize=["threshold"])
def shrink_kernel(
    x_ptr, w_ptr, scales_ptr, seed_ptr, out_ptr,
    n, columns, rank, x_stride, w_stride, out_stride, split_stride, threshold, inv_keep,
    TALL: tl.constexpr, DROPOUT: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = scales * inv_keep * (mask * x) W^T, each program BM rows, BR ranks, one part of the columns.

    x (n, K); W (R, K), or stored (K, R) if TALL; scales (R,) fp32; out (n, R) in x's dtype, or (SPLITS, n, R) fp32
    partial sums without the scales. Reads 2 n K bytes and, once for each row block, W; 67 MB at 8192 x 4096.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    split = tl.program_id(2)
    groups = tl.cdiv(columns, 256)
    each = tl.cdiv(groups, SPLITS)
    row_mask = rows[:, None] < n
    rank_mask = ranks[None, :] < rank
    acc = tl.zeros((BM, BR), tl.float32)
    for group in tl.range(split * each, tl.minimum(split * each + each, groups)):
        if TALL:
            depth = (group * 256 + tl.arange(0, 256))[:, None]
            w_mask = rank_mask if EVEN else rank_mask & (depth < columns)
            w = tl.load(w_ptr + depth * w_stride + ranks[None, :], mask=w_mask, other=0.0)
        else:
            cols = (group * 256 + tl.arange(0, 256))[None, :]
            w_mask = tl.trans(rank_mask) if EVEN else tl.trans(rank_mask) & (cols < columns)
            w = tl.trans(tl.load(w_ptr + ranks[:, None] * w_stride + cols, mask=w_mask, other=0.0))
        x = load_group(x_ptr, rows[:, None], x_stride, row_mask, group, columns, seed_ptr, threshold, DROPOUT, EVEN)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    out_mask = row_mask & rank_mask
    out = out_ptr + rows[:, None].to(tl.int64) * out_stride + ranks[None, :]
    if SPLITS == 1:
        scale = tl.load(scales_ptr + ranks, mask=ranks < rank, other=0.0) * inv_keep
        tl.store(out, (acc * scale[None, :]).to(out_ptr.dtype.element_ty), mask=out_mask)
    else:
        tl.store(out + split.to(tl.int64) * split_stride, acc, mask=out_mask)


def shrink_(
    out: Tensor, x: Tensor, w: Tensor, scales: Tensor, seed: Tensor | None, threshold: int, inv_keep: float,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Write scales * inv_keep * dropout(x) w^T into out.

    Args:
        out: (n, R), rows of any stride; x: (n, K); w: (R, K), or the transpose of a (K, R).
        scales: (R,) fp32; seed: int64, one element, or None for no dropout; threshold: out of 65536.
    """
    (n, columns), rank = x.shape, w.shape[0]
    if n == 0:
        return out
    config = config or shrink_config(x, rank, seed is not None)
    tall = w.stride(0) == 1 and w.stride(1) != 1
    bm, br, splits = config["BM"], config["BR"], config["SPLITS"]
    partial = out if splits == 1 else torch.empty(splits, n, rank, device=x.device, dtype=torch.float32)
    shrink_kernel[cdiv(n, bm), cdiv(rank, br), splits](
        x, w, scales, seed, partial,
        n, columns, rank, x.stride(0), w.stride(1) if tall else w.stride(0), partial.stride(-2), n * rank,
        threshold, inv_keep, TALL=tall, DROPOUT=seed is not None, EVEN=columns % 256 == 0, SPLITS=splits, BM=bm, BR=br,
        PRECISION=precision(x), num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip
    if splits > 1:
        reduce_(out, partial, scales, inv_keep)
    return out
