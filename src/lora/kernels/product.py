"""A product of two tensors, or SwiGLU's: an input made again in the backward pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import cdiv


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
