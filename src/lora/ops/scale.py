"""The output scale of an update that has one (DoRA's m / ||W||), as one operator: y = c * z + bias.

    dz = c * dy,  dc = sum over rows of dy * z,  dbias = sum over rows of dy

Computed in fp32 (fp64 for fp64) and rounded once; c = 1 without a bias changes no bit. The backward pass reads z and
dy, and no fp32 copy of either is made: plain torch goes by blocks of rows, `kernels/scale.py` converts in registers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import rehearsal
from .autograd import is_plain
from .call import as_rows, gradient_dtype
from .dispatch import kernels_take
from .library import define

BLOCK = 2**20  # elements that plain torch has in fp32 at a time


def scale_output(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y = scale * z + bias, (..., out) in z's dtype.

    Args:
        z: (..., out), any float dtype; scale: (out,) fp32 (or fp64); bias: (out,), any float dtype, or None. Gradients
            go to all three, scale's from an fp32 sum that repeats bit for bit.
    """
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return _formula(z, scale, bias)
    y: Tensor = _Scale.apply(z, scale, bias) if is_plain(z) else torch.ops.lora.scale_output(z, scale, bias)
    return y


def _formula(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """In operations that torch differentiates itself, for torch.func and second derivatives."""
    y = z * scale.to(gradient_dtype(z))
    return (y if bias is None else y + bias).to(z.dtype)


def _formula_backward(dy: Tensor, z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    products = _matrix(dy.to(gradient_dtype(z)) * z)
    return _formula(dy, scale, None), products.sum(0).to(scale.dtype)


class _Scale(torch.autograd.Function):
    """Eager calls."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, scale)
        return _run(z, scale, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        functions = (_formula, _formula_backward) if torch.is_grad_enabled() else (_run, _run_backward)
        return _gradients(ctx, dy, *functions)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, scale, _ = inputs
    ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, scale)


def _gradients(ctx: Any, dy: Tensor, forward: Any, backward: Any) -> tuple[Tensor | None, ...]:
    """Of z, scale and bias; z was not kept where scale needs none, and dz = scale * dy is a forward pass then."""
    z, scale = ctx.saved_tensors
    dz, dscale = (forward(dy, scale, None), None) if z is None else backward(dy, z, scale)
    return dz, dscale, _matrix(dy).sum(0) if ctx.needs_input_grad[2] else None


# The operators on every device.


def _in_kernels(z: Tensor) -> bool:
    return z.is_cuda and z.dtype != torch.float64 and kernels_take(z.device, 2)  # fp32 as well: it has no product


def _run(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y, c = _contiguous(z), scale.to(gradient_dtype(z))
    if _in_kernels(z):
        from ..kernels.scale import scale_

        with torch.cuda.device_of(z):
            scale_(_matrix(y), as_rows(_matrix(z)), c.contiguous(), None if bias is None else bias.contiguous())
        return y
    if rehearsal.on_card(z):
        return y
    for block, out in _blocks(z, y):
        wide = block * c
        out.copy_(wide if bias is None else wide.add_(bias))
    return y


def _run_backward(dy: Tensor, z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(dz, dscale)"""
    dz, c = _contiguous(z), scale.to(gradient_dtype(z)).contiguous()
    dscale = torch.zeros_like(c)
    if _in_kernels(z):
        from ..kernels.scale import scale_backward_

        with torch.cuda.device_of(z):
            scale_backward_(_matrix(dz), dscale, as_rows(_matrix(dy)), as_rows(_matrix(z)), c)
    elif not rehearsal.on_card(z):
        for each, block, out in _blocks(dy, z, dz):
            out.copy_(each * c)
            dscale += (each.to(c.dtype) * block).sum(0)
    return dz, dscale.to(scale.dtype)


def _matrix(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _contiguous(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Consecutive rows of each (..., out), as matrices."""
    rows = max(1, BLOCK // max(1, tensors[0].shape[-1]))
    return zip(*[_matrix(t).split(rows) for t in tensors], strict=True)


define(
    "scale_output(Tensor z, Tensor scale, Tensor? bias) -> Tensor", _run, lambda z, scale, bias: _contiguous(z),
    lambda ctx, dy: _gradients(ctx, dy, torch.ops.lora.scale_output, torch.ops.lora.scale_output_backward),
    _setup_context,
)  # fmt: skip
define(
    "scale_output_backward(Tensor dy, Tensor z, Tensor scale) -> (Tensor, Tensor)", _run_backward,
    lambda dy, z, scale: (_contiguous(z), torch.empty_like(scale)),
)  # fmt: skip
