"""Inputs made for one reader: x masked, for more ranks than one block of a kernel holds; a product, made again."""

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


@triton.jit
def product_kernel(left_ptr, right_ptr, out_ptr, size, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """out = left * right or silu(left) * right, silu in fp32 and rounded to the dtype before the product.

    Moves 6 bytes an element: 705 MB at 8192 x 14336. The programs are small and use no shared memory, so
    that they find registers beside a persistent GEMM, which leaves the memory idle.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    left = tl.load(left_ptr + index, mask=inside)
    right = tl.load(right_ptr + index, mask=inside)
    if SILU:
        wide = left.to(tl.float32)
        left = (wide * tl.sigmoid(wide)).to(right.dtype)
    tl.store(out_ptr + index, left * right, mask=inside)


def product(left: Tensor, right: Tensor, silu: bool) -> Tensor:
    """left * right or silu(left) * right; both contiguous and of one shape."""
    out = torch.empty_like(left)
    product_kernel[(cdiv(left.numel(), 2048),)](left, right, out, left.numel(), SILU=silu, BLOCK=2048, num_warps=4)
    return out
