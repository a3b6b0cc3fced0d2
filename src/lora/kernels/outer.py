"""A sum over rows with a thin result: dA = g^T dropout(x). Bound by one read of x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mask import load_group
from .reduce import reduce_
from .tuning import Config, cdiv, outer_config, precision


@triton.jit(do_not_specialize=["threshold"])
def outer_kernel(
    p_ptr, x_ptr, seed_ptr, out_ptr,
    n, columns, rank, p_stride, x_stride, slab, threshold,
    DROPOUT: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[s] = P^T (mask * x) over one slab of rows; each program 256 columns, BR ranks, one slab.

    P (n, R), x (n, K), out (S, R, K) fp32. Reads 2 n K bytes and writes 4 S R K: the slabs are long, so that the
    partial sums stay small; 67 MB at 8192 x 4096.
    """
    group = tl.program_id(0)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    split = tl.program_id(2)
    cols = (group * 256 + tl.arange(0, 256))[None, :]
    rank_mask = ranks[None, :] < rank
    acc = tl.zeros((BR, 256), tl.float32)
    for start in tl.range(split * slab, tl.minimum(split * slab + slab, n), BN):
        rows = (start + tl.arange(0, BN))[:, None]
        row_mask = rows < n
        p = tl.load(p_ptr + rows.to(tl.int64) * p_stride + ranks[None, :], mask=row_mask & rank_mask, other=0.0)
        x = load_group(x_ptr, rows, x_stride, row_mask, group, columns, seed_ptr, threshold, DROPOUT, EVEN)
        acc = tl.dot(tl.trans(p), x, acc, input_precision=PRECISION)
    out = out_ptr + (split.to(tl.int64) * rank + ranks[:, None]) * columns + cols
    tl.store(out, acc, mask=(ranks[:, None] < rank) & (cols < columns))


def outer_(
    out: Tensor, p: Tensor, x: Tensor, seed: Tensor | None = None, threshold: int = 0,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Write p^T dropout(x) into out, (R, K) fp32 and contiguous.

    Args:
        p: (n, R), unit column stride, already times 1 / (1 - p) where there is dropout; x: (n, K), unit column stride.
    """
    (n, columns), rank = x.shape, p.shape[1]
    assert out.is_contiguous()
    if n == 0:
        return out.zero_()
    config = config or outer_config(x, rank, seed is not None)
    bn, br = config["BN"], config["BR"]
    slab = cdiv(cdiv(n, config["SPLITS"]), bn) * bn
    splits = cdiv(n, slab)
    partial = out if splits == 1 else torch.empty(splits, rank, columns, device=x.device, dtype=torch.float32)
    outer_kernel[cdiv(columns, 256), cdiv(rank, br), splits](
        p, x, seed, partial, n, columns, rank, p.stride(0), x.stride(0), slab, threshold,
        DROPOUT=seed is not None, EVEN=columns % 256 == 0, BN=bn, BR=br, PRECISION=precision(x),
        num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip
    if splits > 1:
        reduce_(out.view(1, -1), partial.view(splits, 1, -1))
    return out
