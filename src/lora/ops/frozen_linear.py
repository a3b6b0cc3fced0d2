"""The product with one quantized weight on which no adapter acts: y = x W^T + b, dx = dy W.

The activations are not quantized, and nothing is saved: the weight is dequantized again for the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .autograd import is_plain, once, refuse_transforms, unchanged, versions
from .dequantize import Packed, layout
from .library import define


def frozen_linear(x: Tensor, parts: Sequence[Tensor], format: str, bias: Tensor | None) -> Tensor:
    """y (..., out) of x (..., in), in x's dtype.

    Args:
        parts: the tensors of a `dequantize.Layout`, in its order; format: that as text; bias: (out,), in x's dtype.

    Raises:
        LoraError: the parts are not of that layout; or this runs within a transform of torch.func, whose derivatives
            would be wrong.
    """
    refuse_transforms()
    # torch takes (a, b, in) without a bias as one product if its rows follow each other, which a contiguous tensor's
    # need not where a dimension is 1. The result is then no view, which nobody could change in place.
    whole = x.dim() == 2 or (
        x.dim() == 3 and bias is None and x.is_contiguous() and x.stride(0) == x.stride(1) * x.shape[1]
    )
    rows = x if whole else x.reshape(-1, x.shape[-1])
    y: Tensor
    if is_plain(rows):
        y = _Product.apply(Packed(parts, format), rows, bias)
    else:
        y = torch.ops.lora.frozen_linear(rows, list(parts), format, bias)
    return y if whole else y.view(*x.shape[:-1], y.shape[-1])


class _Product(torch.autograd.Function):
    """Eager calls. The weight is kept, not saved, as `autograd.Held` has it."""

    @staticmethod
    def forward(ctx: Any, weight: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.versions = weight, versions(weight.parts)
        return linear(x, weight.dense(x.dtype), bias)

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_x, needs_bias = ctx.needs_input_grad
        if needs_x:
            unchanged(ctx.weight.parts, ctx.versions)
        return None, _dx(dy, ctx.weight) if needs_x else None, dy.flatten(0, -2).sum(0) if needs_bias else None


def _dx(dy: Tensor, weight: Packed) -> Tensor:
    return (dy.reshape(-1, dy.shape[-1]) @ weight.dense(dy.dtype)).view(*dy.shape[:-1], weight.form.shape[1])


# The operator, for calls that are traced.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.parts, ctx.format, _ = inputs


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs_x, _, _, needs_bias = ctx.needs_input_grad
    dx = torch.ops.lora.frozen_linear_backward(dy, ctx.parts, ctx.format) if needs_x else None
    return dx, [None] * len(ctx.parts), None, dy.flatten(0, -2).sum(0) if needs_bias else None


define(
    "frozen_linear(Tensor x, Tensor[] parts, str format, Tensor? bias) -> Tensor",
    lambda x, parts, format, bias: linear(x, Packed(parts, format).dense(x.dtype), bias),
    lambda x, parts, format, bias: x.new_empty(*x.shape[:-1], layout(format).shape[0]),
    _backward, _setup_context,
)  # fmt: skip
define(
    "frozen_linear_backward(Tensor dy, Tensor[] parts, str format) -> Tensor",
    lambda dy, parts, format: _dx(dy, Packed(parts, format)),
    lambda dy, parts, format: dy.new_empty(*dy.shape[:-1], layout(format).shape[1]),
)
