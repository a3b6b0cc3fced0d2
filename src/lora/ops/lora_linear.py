"""The low-rank formula for one linear in operations that torch differentiates itself, and as a matrix."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LoraError

Term = tuple[Tensor, Tensor, float, float]
"""A (r, in), B (out, r), scaling, dropout probability (0 outside training)."""
BiasT = TypeVar("BiasT", Tensor, Tensor | None)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Iterable[Term]) -> Tensor:
    """y = x W0^T + bias + sum over updates of s dropout(x) A^T B^T  (Hu et al., 2021, arXiv:2106.09685).

    Args:
        x: (..., in), any float dtype; the compute runs in it.
        weight: W0 (out, in); bias: (out,) or None.
        updates: A and B are fp32 masters, cast to the compute dtype; x is never copied to fp32.

    Returns:
        (..., out), in the dtype that x W0^T has (autocast's, where it is on).
    """
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    # In place on a 2-D result: no second output, and no copy of a view's gradient in the backward pass.
    y = add_updates_(F.linear(rows, weight, bias), rows, updates)
    return y if x.dim() == 2 else y.view(x.shape[:-1] + y.shape[-1:])


def add_updates_(y: Tensor, x: Tensor, updates: Iterable[Term]) -> Tensor:
    """y + sum over updates of s dropout(x) A^T B^T, in place: y (n, out), x (n, in)."""
    for A, B, scaling, dropout in updates:
        refuse_meta(A, x)
        dropped = F.dropout(x, dropout) if dropout else x
        hidden = F.linear(dropped, as_dtype(A, x.dtype))  # (n, r)
        y = y.addmm_(as_dtype(hidden, y.dtype), as_dtype(B, y.dtype).t(), alpha=scaling)
    return y


def low_rank_product(updates: Iterable[tuple[Tensor, Tensor, float]], rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of D = sum of s B A, (n, in) in `dtype`, from A (r, in), B (out, r) and s, for merging.

    Summed in float64 and rounded once, so that merge and unmerge find the same bits again whatever the number of
    threads or the device: the order of summation moves a float64 sum by far less than fp32 shows.
    """
    products = ((B[rows].double() @ A.double()).mul_(scaling) for A, B, scaling in updates)  # two at a time
    return functools.reduce(Tensor.add_, products).to(dtype)


def refuse_meta(A: Tensor, x: Tensor) -> None:
    """A product of a real and a meta tensor is memory that nobody wrote, without a word."""
    if A.is_meta and not x.is_meta:
        raise LoraError(
            "model: an adapter's A and B are on the meta device, and nothing brings them to where it runs; where "
            "accelerate offloads the model, do that first and inject then; else load the base's values, then inject"
        )


def summed_bias(base: BiasT, terms: Sequence[Any]) -> BiasT:
    """base + sum of (trained - base): the trained biases of several adapters add as their updates do; one is itself.

    terms: each has `bias`, (out,) or None.
    """
    trained: list[Tensor] = [t.bias for t in terms if t.bias is not None]
    if base is None or not trained:
        return base
    total = trained[0]
    for bias in trained[1:]:
        total = total + (bias - base)
    return total.to(base.dtype)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without the microsecond that it costs where nothing is to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
