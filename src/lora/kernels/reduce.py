# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
# Triton is optional and a kernel is a program in its own language: neither carries Python types.
"""The second stage of a split sum, in a fixed order: no float atomics, the same bits every time."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def reduce_kernel(
    partial_ptr, scales_ptr, out_ptr, size, width, out_stride, inv_keep,
    SCALED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i, j] = (sum over s of partial[s, i, j]) * scales[j] * inv_keep; partial fp32 (SPLITS, rows, width).

    Reads 4 SPLITS bytes an element, mostly from L2, where the first stage has just left them: 2 to 4 us.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + s * size.to(tl.int64) + index, mask=inside, other=0.0)
    i, j = index // width, index % width
    if SCALED:
        total *= tl.load(scales_ptr + j, mask=inside, other=0.0) * inv_keep
    tl.store(out_ptr + i.to(tl.int64) * out_stride + j, total.to(out_ptr.dtype.element_ty), mask=inside)


def reduce_(out: Tensor, partial: Tensor, scales: Tensor | None = None, inv_keep: float = 1.0) -> Tensor:
    """Sum partial (S, rows, width) fp32 over S into out (rows, width), times scales (width,) where given."""
    splits, rows, width = partial.shape
    block = 256 if rows * width < 2**19 else 1024
    reduce_kernel[(triton.cdiv(rows * width, block),)](
        partial, scales, out, rows * width, width, out.stride(0), inv_keep,
        SCALED=scales is not None, SPLITS=splits, BLOCK=block, num_warps=4 if block == 1024 else 2,
    )  # fmt: skip
    return out
