"""The operator's eager calls: two autograd functions in place of its dispatch, which costs 0.2 ms of Python each."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraError
from . import rehearsal
from .call import Call
from .dispatch import form
from .recompute import Factors, remake

Grads = list[Tensor | None]


def is_plain(x: Tensor) -> bool:
    """Whether nobody traces or watches this call."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and (torch._C._len_torch_dispatch_stack() == 0 or rehearsal.watched(x))
        and torch._C._get_tracing_state() is None
    )


def refuse_transforms() -> None:
    """Raise within a transform of torch.func, whose derivatives would be wrong."""
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        raise LoraError(
            "model: torch.func's transforms (grad, jvp, vmap, ...) do not pass through fused and quantized linears; "
            "lora.merge(model) makes plain linears of them, through which they do"
        )


def once(function: Callable[..., Any]) -> Any:
    """A backward pass that has no derivative of its own, and says so when a second derivative reaches it."""

    @wraps(function)
    def loud(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(ctx, *grads)
        with torch.no_grad():  # create_graph=True
            found = function(ctx, *grads)
        return _End.apply(torch.empty(0, requires_grad=True), *found)

    return loud


class _End(torch.autograd.Function):
    """Gradients as they are; whoever differentiates them is told that it cannot be done."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if gradient is None else gradient.clone() for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise LoraError(
            "model: second derivatives (create_graph=True) do not pass through fused and quantized linears; "
            "lora.merge(model) makes plain linears of them, which have them"
        )


class Held(torch.autograd.Function):
    """h, and all that the backward pass reads: it gives every gradient but the biases', from what it saved itself.

    A node of its own, before the large products: a checkpoint's recomputation stops once it has all that was saved, so
    it does not repeat the last products of a layer. `Products` hands it the dys as the gradients of the places y_i,
    tensors of the outputs' shapes that have one element of memory and are never read.

    The weights are not saved, which would have a checkpoint pack and unpack them, but kept; so they live as long as the
    graph, whoever replaces them in their module meanwhile. Those that are stored as they are, and so might train, are
    among the leaves as well, before every A and every B.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        h = form(x).hidden(x, call)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(h)
        ctx.remake = remake(x)
        ctx.save_for_backward(x if ctx.remake is None else None, h, call.A, call.scales, call.seed, *call.B)
        ctx.matrices, ctx.dropout, ctx.versions = call.matrices, call.dropout, versions(call.matrices.tensors)
        ctx.dense = 0 if call.matrices.packed else len(call.B)
        ctx.masters = [(t.shape, t.dtype) for t in leaves[ctx.dense :]]
        place = x.new_empty(())
        return h, *[place.expand(x.shape[0], b.shape[0]) for b in call.B]

    @staticmethod
    @once
    def backward(ctx: Any, _: None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, A, scales, seed, *B = ctx.saved_tensors
        dys = filled(grads, B)
        if not dys:
            return (None,) * len(ctx.needs_input_grad)
        _, needs_x, *needs = ctx.needs_input_grad
        if needs_x:
            unchanged(ctx.matrices.tensors, ctx.versions)
        x = x if ctx.remake is None else ctx.remake.factors()
        found = form(h).backward(dys, x, h, Call(ctx.matrices, A, B, scales, ctx.dropout, seed), needs_x)
        dx = found.pop() if needs_x else None
        return None, dx, *weight_gradients(dys, x, needs[: ctx.dense]), *master_gradients(found, ctx.masters)


class Products(torch.autograd.Function):
    """y_i = x W_i^T + b_i + h_i B_i^T from x and h, and the gradients of the biases; `Held` gives those of the rest."""

    @staticmethod
    def forward(ctx: Any, call: Call, x_and_h: tuple[Tensor, Tensor], biases: int, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        return tuple(form(x_and_h[0]).products(*x_and_h, call, list(tensors[:biases])))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3 : len(ctx.needs_input_grad) - len(dys)]
        return None, None, None, *bias_gradients(dys, needs), *dys


def versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


def unchanged(weights: Sequence[Tensor], before: list[int]) -> None:
    """Raise where a weight that the backward pass reads is not what it was."""
    if versions(weights) != before:
        raise LoraError("model: a weight was changed after the forward pass; run that again, then backward")


def filled(grads: Sequence[Tensor | None], B: Sequence[Tensor]) -> list[Tensor]:
    """dy_i (n, out_i) of every target, zeros where an output was not used; none at all where none was."""
    given = next((dy for dy in grads if dy is not None), None)
    if given is None:
        return []
    rows = given.shape[0]
    return [given.new_zeros(rows, b.shape[0]) if dy is None else dy for dy, b in zip(grads, B, strict=True)]


def bias_gradients(dys: Sequence[Tensor | None], needs: Sequence[bool]) -> Grads:
    """By target, where there are biases; none of an output that was not used."""
    return [dy.sum(0) if need and dy is not None else None for need, dy in zip(needs, dys, strict=False)]


def master_gradients(found: list[Tensor], masters: list[tuple[torch.Size, torch.dtype]]) -> Grads:
    """The gradients of every A, then of every B, in their own dtypes, from [dA, dB_i ...] stacked by target."""
    grads: Grads = []
    left = iter(masters)
    for i, stacked in enumerate(found):
        dim, start = min(i, 1), 0  # A by rows, B by columns
        while start < stacked.shape[dim]:
            shape, dtype = next(left)
            grads.append(stacked.narrow(dim, start, shape[dim]).to(dtype))
            start += shape[dim]
    return grads


def weight_gradients(dys: list[Tensor], x: Tensor | Factors, needs: Sequence[bool]) -> Grads:
    """dW_i = dy_i^T x where a dense W0 trains; a quantized one cannot, and its tensors are not one to a target."""
    if not any(needs):
        return [None] * len(needs)
    x = x.product() if isinstance(x, Factors) else x
    return [dy.t() @ x if need else None for dy, need in zip(dys, needs, strict=True)]
