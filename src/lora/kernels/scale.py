"""y = c * z + bias and its backward pass, converted to fp32 in registers and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduce import reduce_
from .tuning import card, cdiv

ROWS, COLUMNS = 16, 256  # a step of a program
PER_PROCESSOR = 16  # programs that the backward pass has at most, which bounds its partial sums


@triton.jit
def scale_kernel(
    z_ptr, scale_ptr, bias_ptr, y_ptr,
    n, columns, z_stride, BIAS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = c * z + bias, each program BM rows and BC columns. z (n, N) of any row stride, y (n, N); c (N,) fp32.

    Moves 4 n N bytes: 134 MB at 8192 x 4096.
    """
    rows = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = cols < columns
    mask = (rows < n) & inside[None, :]
    z = tl.load(z_ptr + rows.to(tl.int64) * z_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y = z * tl.load(scale_ptr + cols, mask=inside, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows.to(tl.int64) * columns + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_backward_kernel(
    dy_ptr, z_ptr, scale_ptr, dz_ptr, out_ptr,
    n, columns, dy_stride, z_stride, slab, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dz = c * dy, and out[s] = sum of dy * z over one slab s of rows; each program BC columns and one slab.

    dy, z (n, N) of any row stride, dz (n, N), out (slabs, N) fp32. Moves 6 n N bytes, the slabs being long: 201 MB at
    8192 x 4096.
    """
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    split = tl.program_id(1)
    inside = cols < columns
    c = tl.load(scale_ptr + cols, mask=inside, other=0.0)[None, :]
    acc = tl.zeros((BC,), tl.float32)
    for start in tl.range(split * slab, tl.minimum(split * slab + slab, n), BM):
        rows = (start + tl.arange(0, BM))[:, None].to(tl.int64)
        mask = (rows < n) & inside[None, :]
        dy = tl.load(dy_ptr + rows * dy_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + rows * z_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dz_ptr + rows * columns + cols[None, :], (c * dy).to(dz_ptr.dtype.element_ty), mask=mask)
        acc += tl.sum(dy * z, 0)
    tl.store(out_ptr + split.to(tl.int64) * columns + cols, acc, mask=inside)


def scale_(y: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Write scale * z + bias into y (n, N), contiguous; z (n, N) of unit column stride, scale (N,) fp32, bias (N,)."""
    n, columns = z.shape
    if n:
        scale_kernel[cdiv(n, ROWS), cdiv(columns, COLUMNS)](
            z, scale, bias, y, n, columns, z.stride(0), BIAS=bias is not None, BM=ROWS, BC=COLUMNS, num_warps=4
        )
    return y


def scale_backward_(dz: Tensor, dscale: Tensor, dy: Tensor, z: Tensor, scale: Tensor, programs: int = 0) -> None:
    """Write scale * dy into dz (n, N), contiguous, and the sum over rows of dy * z into dscale (N,) fp32.

    Args:
        dy, z: (n, N) of unit column stride; scale: (N,) fp32; programs: at most, 0 for as many as fit the card.
    """
    n, columns = z.shape
    if n == 0:
        dscale.zero_()
        return
    programs = programs or PER_PROCESSOR * (card(z.device).processors if z.is_cuda else 1)
    blocks = cdiv(columns, COLUMNS)
    slab = cdiv(cdiv(n, max(1, programs // blocks)), ROWS) * ROWS
    splits = cdiv(n, slab)
    partial = torch.empty(splits, 1, columns, device=z.device, dtype=torch.float32)
    scale_backward_kernel[blocks, splits](
        dy, z, scale, dz, partial, n, columns, dy.stride(0), z.stride(0), slab, BM=ROWS, BC=COLUMNS, num_warps=4
    )
    reduce_(dscale.view(1, -1), partial)
