"""The operator's eager calls: two autograd functions in place of its dispatch, which costs 0.2 ms of Python each."""

import itertools
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import LoraError
from .recompute import Factors, remake
from .reference import Matrices, backward, hidden, products

T = TypeVar("T")
Grads = list[Tensor | None]


def is_plain(x: Tensor) -> bool:
    """Whether nobody traces or watches this call."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
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
            found = list(function(ctx, *grads))
        places = [i for i, value in enumerate(found) if value is not None]
        start = torch.empty(0, requires_grad=True)
        ends = _End.apply(start, *(found[i] for i in places))  # type: ignore[no-untyped-call]
        for i, value in zip(places, ends, strict=True):
            found[i] = value
        return tuple(found)

    return loud


class _End(torch.autograd.Function):
    """Gradients as they are; whoever differentiates them is told that it cannot be done."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.clone() for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise LoraError(
            "model: second derivatives (create_graph=True) do not pass through fused and quantized linears; "
            "lora.merge(model) makes plain linears of them, which have them"
        )


class Call(NamedTuple):
    """What `Products` is told beside its leaves: `sizes`, how many of them are weights, biases, A and B; `source`, the
    node that holds what the backward pass reads, or None where nothing but biases trains."""

    matrices: Matrices
    dropout: float
    B_cast: list[Tensor]
    sizes: list[int]
    source: Any


class Held(torch.autograd.Function):
    """h, and all that the backward pass reads.

    A node of its own, before the large products: a checkpoint's recomputation stops once it has all that was saved, so
    it does not repeat the last products of a layer.
    """

    @staticmethod
    def forward(
        ctx: Any, A_cast: Tensor, B_cast: list[Tensor], scales: Tensor, dropout: float, seed: Tensor | None, x: Tensor,
        *leaves: Tensor,
    ) -> Tensor:  # fmt: skip
        h = hidden(x, A_cast, scales, dropout, seed)
        ctx.set_materialize_grads(False)
        ctx.remake = remake(x)
        ctx.save_for_backward(x if ctx.remake is None else None, h, A_cast, scales, seed, *B_cast)
        return h

    @staticmethod
    @once
    def backward(ctx: Any, _: Tensor | None) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)  # the products' backward pass gives every gradient


class Products(torch.autograd.Function):
    """y_i = x W_i^T + b_i + h_i B_i^T, and the gradients of everything.

    The weights are not saved, which would have a checkpoint pack and unpack them, but kept; so they live as long as the
    graph, whoever replaces them in their module meanwhile. Those that are stored as they are, and so might train, are
    among the leaves as well.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, h: Tensor, x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        _, biases, A, B = _parts(leaves, call.sizes)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.versions = call._replace(B_cast=[]), versions(call.matrices.tensors)
        ctx.masters = [(t.shape, t.dtype) for t in (*A, *B)]
        ctx.targets = [b.shape[0] for b in call.B_cast]
        return tuple(products(x, h, call.matrices, biases, call.B_cast))

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        dys = filled(grads, ctx.targets)
        if not dys:
            return (None,) * len(ctx.needs_input_grad)
        needs_x, *needs = ctx.needs_input_grad[2:]
        if needs_x:
            unchanged(call.matrices.tensors, ctx.versions)
        needs_w, needs_b, _, _ = _parts(needs, call.sizes)
        grad_b: Grads = [dys[i].sum(0) if needs else None for i, needs in enumerate(needs_b)]
        if call.source is None:  # only biases train
            return None, None, None, *[None] * len(needs_w), *grad_b, *[None] * len(ctx.masters)
        x, h, A_cast, scales, seed, *B_cast = call.source.saved_tensors
        x, factor, silu = (x, None, False) if call.source.remake is None else call.source.remake.factors()
        found = backward(dys, x, factor, silu, h, call.matrices, A_cast, B_cast, scales, call.dropout, seed, needs_x)
        dx = found.pop() if needs_x else None
        grad_w = weight_gradients(dys, x, factor, silu, needs_w)
        return None, None, dx, *grad_w, *grad_b, *master_gradients(found, ctx.masters)


def _parts(items: Sequence[T], sizes: list[int]) -> list[list[T]]:
    """Consecutive pieces of these sizes."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [list(items[a:b]) for a, b in itertools.pairwise(ends)]


def versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


def unchanged(weights: Sequence[Tensor], before: list[int]) -> None:
    """Raise where a weight that the backward pass reads is not what it was."""
    if versions(weights) != before:
        raise LoraError("model: a weight was changed after the forward pass; run that again, then backward")


def filled(grads: Sequence[Tensor | None], targets: list[int]) -> list[Tensor]:
    """dy_i (n, out_i) of every target, zeros where an output was not used; none at all where none was."""
    given = next((dy for dy in grads if dy is not None), None)
    if given is None:
        return []
    rows = given.shape[0]
    return [given.new_zeros(rows, n) if dy is None else dy for dy, n in zip(grads, targets, strict=True)]


def master_gradients(found: list[Tensor], masters: list[tuple[torch.Size, torch.dtype]]) -> Grads:
    """The gradients of every A, then of every B, in their own dtypes, from [dA, dB_i ...] stacked by target."""
    dA, *dBs = found
    shapes_A, shapes_B = masters[: len(masters) // 2], iter(masters[len(masters) // 2 :])
    grads: Grads = []
    start = 0
    for shape, dtype in shapes_A:
        grads.append(dA[start : start + shape[0]].to(dtype))
        start += shape[0]
    for dB in dBs:
        start = 0
        while start < dB.shape[1]:
            shape, dtype = next(shapes_B)
            grads.append(dB[:, start : start + shape[1]].to(dtype))
            start += shape[1]
    return grads


def weight_gradients(dys: list[Tensor], x: Tensor, factor: Tensor | None, silu: bool, needs: Sequence[bool]) -> Grads:
    """dW_i = dy_i^T x where a dense W0 trains; a quantized one cannot, and its tensors are not one to a target."""
    if not any(needs):
        return [None] * len(needs)
    if factor is not None:
        x = Factors(x, factor, silu).product()
    return [dys[i].t() @ x if need else None for i, need in enumerate(needs)]
