"""mask * x as a copy that lives as long as its reader: for more ranks than one block of a kernel holds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mask import load_parts
from .tuning import cdiv


@triton.jit(do_not_specialize=["threshold"])
def dropped_kernel(
    x_ptr, seed_ptr, out_ptr,
    n, columns, x_stride, threshold, EVEN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out = mask * x, each program BM rows and 256 columns. x (n, K), out (n, K) contiguous.

    Moves 4 n K bytes: 134 MB at 8192 x 4096.
    """
    group = tl.program_id(1)
    rows = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    row_mask = rows < n
    # All the loads before the first store, which the compiler would not move a load across.
    parts = load_parts(x_ptr, rows, x_stride, row_mask, group, columns, seed_ptr, threshold, EVEN)
    for part in tl.static_range(8):
        cols = (group * 256 + part * 32 + tl.arange(0, 32))[None, :]
        mask = row_mask if EVEN else row_mask & (cols < columns)
        tl.store(out_ptr + rows.to(tl.int64) * columns + cols, parts[part], mask=mask)


def dropped(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """mask * x, contiguous; x (n, K) of unit column stride, seed int64 of one element, threshold out of 65536."""
    n, columns = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if n:
        dropped_kernel[cdiv(n, 16), cdiv(columns, 256)](
            x, seed, out, n, columns, x.stride(0), threshold, EVEN=columns % 256 == 0, BM=16, num_warps=4
        )
    return out
