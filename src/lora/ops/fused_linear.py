# mypy: disable-error-code="no-untyped-call"
# torch.library's registration functions carry no types.
"""lora_linear as one operator: several linears of one input, their low-rank updates, dropout by seed.

    h = scales / (1 - p) * (mask * x) A^T                       (n, R)    A: every target's and adapter's, stacked
    y_i = x W_i^T + b_i + h_i B_i^T                             (n, N_i)  h_i: the target's columns of h
    g_i = scales_i / (1 - p) * dy_i B_i                         (n, R_i)
    dA = g^T (mask * x),  dB_i = dy_i^T h_i,  dx = sum of dy_i W_i + mask * (g A)

Saved for the backward pass: h, and x where `recompute.recipe` cannot make it again. The mask comes again from the seed,
and a quantised weight is dequantised again. `fused_forms.py` computes: in plain torch, the CPU path and the oracle, or
with `kernels/linear.py` on CUDA.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import LoraError
from .fused_forms import Matrices, backward, forward, frozen_backward, gradient_dtype, hidden, products
from .philox import draw_seed
from .recompute import Factors, recipe

LIBRARY = torch.library.Library("lora", "FRAGMENT")
LIBRARY.define(
    "fused_linear(Tensor x, Tensor[] weights, str formats, Tensor[] biases, Tensor[] A, Tensor[] B, Tensor A_cast,"
    " Tensor[] B_cast, Tensor scales, float dropout, Tensor? seed) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "fused_linear_backward(Tensor[] dys, Tensor x, Tensor? factor, bool silu, Tensor h, Tensor[] weights, str formats,"
    " Tensor A_cast, Tensor[] B_cast, Tensor scales, float dropout, Tensor? seed, bool needs_dx) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "frozen_linear_backward(Tensor[] dys, Tensor[] weights, str formats) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Copies(NamedTuple):
    """What a forward pass and its backward pass compute with, made from the fp32 masters."""

    A: Tensor  # (R, in), the targets' ranks one after the other, each target's adapters one after the other
    B: list[Tensor]  # (out_i, R_i) for each target
    scales: Tensor  # (R,) fp32


def make_copies(
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    scalings: Sequence[Sequence[float]],
    dtype: torch.dtype,
) -> Copies:
    """Copies of the masters in the compute dtype; each argument is indexed by target, then by adapter.

    Args:
        A: (r, in) each; B: (out, r) each; scalings: alpha / r or what stands for it, one number each.
    """
    flat_A, flat_B = [a.detach() for target in A for a in target], [b.detach() for target in B for b in target]
    ranks = [a.shape[0] for a in flat_A]
    stacked = flat_A[0].new_empty(sum(ranks), flat_A[0].shape[1], dtype=dtype)
    joined = [b[0].new_empty(b[0].shape[0], sum(each.shape[1] for each in b), dtype=dtype) for b in B]
    places = list(stacked.split(ranks))
    for target, whole in zip(B, joined, strict=True):
        places += whole.split([b.shape[1] for b in target], 1)
    torch._foreach_copy_(places, flat_A + flat_B)  # one launch for all the casts
    numbers = tuple(s for target in scalings for s in target)
    return Copies(stacked, joined, _scales(tuple(ranks), numbers, stacked.device))


def _scales(ranks: tuple[int, ...], numbers: tuple[float, ...], device: torch.device) -> Tensor:
    if len(set(numbers)) == 1:
        return torch.full((sum(ranks),), numbers[0], device=device, dtype=torch.float32)
    parts = [torch.full((r,), s, device=device, dtype=torch.float32) for r, s in zip(ranks, numbers, strict=True)]
    return torch.cat(parts)


def fused_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    scalings: Sequence[Sequence[float]],
    dropout: float = 0.0,
    seed: Tensor | None = None,
    formats: str = "",
) -> list[Tensor]:
    """y_i = x W_i^T + b_i + sum over the target's adapters of s dropout(x) A^T B^T, for targets that share x.

    Args:
        x: (..., in); weights: (out_i, in) each, in x's dtype; biases: (out_i,) each, or None for none.
        formats: "", or how `weights` store the matrices where they are quantised, as `Matrices` has it.
        A, B, scalings: by target, then by adapter: (r, in), (out_i, r) and a number. Gradients go to these, in their
            own dtype, from fp32 sums.
        dropout: one probability and one mask for all of them; seed: (1,) int64 on x's device, drawn if None.

    Returns:
        (..., out_i) for each target.
    """
    rows = x.reshape(-1, x.shape[-1])
    flat_A, flat_B = [a for target in A for a in target], [b for target in B for b in target]
    plain = _plain(x)
    if flat_A:
        copies = make_copies(A, B, scalings, x.dtype)
    else:  # the frozen product alone
        matrices = Matrices(weights, formats, x.dtype)
        outs = tuple(matrices.shape(i)[0] for i in range(len(B)))
        copies = (_nothing if plain else _nothing.__wrapped__)(outs, x.shape[-1], x.dtype, x.device)
    if not dropout:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    weights, biases = list(weights), list(biases or [])
    if plain:
        if flat_A or any(w.requires_grad for w in weights):
            h = _Held.apply(copies, dropout, seed, rows, *weights, *flat_A, *flat_B)
        else:
            h = rows.new_empty(rows.shape[0], 0)
        sizes = [len(weights), len(biases), len(flat_A), len(flat_B)]
        call = Call(formats, dropout, copies.B, sizes, h.grad_fn)
        outputs = _Products.apply(call, h, rows, *weights, *biases, *flat_A, *flat_B)
    else:
        outputs = torch.ops.lora.fused_linear(
            rows, weights, formats, biases, flat_A, flat_B, copies.A, copies.B, copies.scales, dropout, seed
        )
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs[: len(B)]]


@functools.cache
def _nothing(outs: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device) -> Copies:
    """Copies of no adapters."""
    like = torch.empty(0, dtype=dtype, device=device)
    return Copies(like.new_empty(0, width), [like.new_empty(n, 0) for n in outs], like.float())


class Call(NamedTuple):
    """What `_Products` is told beside its tensors; `source` is the node that holds what its backward pass reads."""

    formats: str
    dropout: float
    B_cast: list[Tensor]
    sizes: list[int]
    source: Any


class _Held(torch.autograd.Function):
    """h, and all that the backward pass reads.

    A node of its own, before the large products: a checkpoint's recomputation stops once it has all that was saved, so
    it does not repeat the last products of a layer.
    """

    @staticmethod
    def forward(ctx: Any, copies: Copies, dropout: float, seed: Tensor | None, x: Tensor, *masters: Tensor) -> Tensor:
        h = hidden(x, copies.A, copies.scales, dropout, seed)
        ctx.set_materialize_grads(False)
        ctx.recipe = recipe(x)
        ctx.save_for_backward(x if ctx.recipe is None else None, h, copies.A, copies.scales, seed, *copies.B)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)  # the products' backward pass gives every gradient


class _Products(torch.autograd.Function):
    """The operator without its dispatch, which costs 0.2 ms of Python a call: for eager calls on plain tensors."""

    @staticmethod
    def forward(ctx: Any, call: Call, h: Tensor, x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        weights, biases, A, B = _parts(leaves, call.sizes)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.weights = call, weights  # frozen, and not saved: a checkpoint would pack and unpack them
        ctx.versions = _versions(weights)
        ctx.masters = [(t.shape, t.dtype) for t in (*A, *B)]
        ctx.targets = [b.shape[0] for b in call.B_cast]
        return tuple(products(x, h, weights, call.formats, biases, call.B_cast))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, weights = ctx.call, ctx.weights
        given = [dy for dy in grads if dy is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.versions != _versions(weights):
            raise LoraError("model: a frozen weight was changed after the forward pass; run that again, then backward")
        rows = given[0].shape[0]
        dys = [given[0].new_zeros(rows, n) if dy is None else dy for dy, n in zip(grads, ctx.targets, strict=True)]
        needs_x, *needs = ctx.needs_input_grad[2:]
        needs_w, needs_b, _, _ = _parts(needs, call.sizes)
        grad_b: Grads = [dys[i].sum(0) if needs else None for i, needs in enumerate(needs_b)]
        if call.source is None:
            dx = frozen_backward(dys, weights, call.formats) if needs_x else None
            return None, None, dx, *[None] * len(weights), *grad_b, *[None] * len(ctx.masters)
        x, h, A_cast, scales, seed, *B_cast = call.source.saved_tensors
        x, factor, silu = (x, None, False) if call.source.recipe is None else call.source.recipe.factors()
        found = backward(
            dys, x, factor, silu, h, weights, call.formats, A_cast, B_cast, scales, call.dropout, seed, needs_x
        )
        dx = found.pop() if needs_x else None
        grad_w = _weight_gradients(dys, x, factor, silu, needs_w)
        return None, None, dx, *grad_w, *grad_b, *_master_gradients(found, ctx.masters)


T = TypeVar("T")
Grads = list[Tensor | None]


def _parts(items: Sequence[T], sizes: list[int]) -> list[list[T]]:
    """Consecutive pieces of these sizes."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [list(items[a:b]) for a, b in itertools.pairwise(ends)]


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


def _plain(x: Tensor) -> bool:
    """Whether nobody traces, transforms or watches this call."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
    )


# Shapes, and gradients.


def _fake(
    x: Tensor, weights: list[Tensor], formats: str, biases: list[Tensor], A: list[Tensor], B: list[Tensor],
    A_cast: Tensor, B_cast: list[Tensor], scales: Tensor, dropout: float, seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    h = x.new_empty(x.shape[0], -(-A_cast.shape[0] // 8) * 8)
    return [*(x.new_empty(x.shape[0], b.shape[0]) for b in B_cast), h]


def _fake_backward(
    dys: list[Tensor], x: Tensor, factor: Tensor | None, silu: bool, h: Tensor, weights: list[Tensor], formats: str,
    A_cast: Tensor, B_cast: list[Tensor], scales: Tensor, dropout: float, seed: Tensor | None, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    dtype = gradient_dtype(x)
    grads = [t.new_empty(t.shape, dtype=dtype) for t in (A_cast, *B_cast)]
    return [*grads, x.new_empty(x.shape)] if needs_dx else grads


def _fake_frozen_backward(dys: list[Tensor], weights: list[Tensor], formats: str) -> Tensor:
    return dys[0].new_empty(dys[0].shape[0], Matrices(weights, formats, dys[0].dtype).shape(0)[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, formats, _, A, B, A_cast, B_cast, scales, dropout, seed = inputs
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)
    ctx.needs_x = bool(A) or any(w.requires_grad for w in weights)  # a frozen product alone saves no input
    ctx.save_for_backward(x if ctx.needs_x else None, output[-1], A_cast, scales, seed, *weights, *B_cast)
    ctx.dropout, ctx.tensors, ctx.formats = dropout, len(weights), formats
    ctx.masters = [(t.shape, t.dtype) for t in (*A, *B)]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, h, A_cast, scales, seed, *rest = ctx.saved_tensors
    weights, B_cast = rest[: ctx.tensors], rest[ctx.tensors :]
    needs_x, needs_w, _, needs_b = ctx.needs_input_grad[:4]
    dys = [h.new_zeros(h.shape[0], b.shape[0]) if dy is None else dy for dy, b in zip(grads, B_cast, strict=False)]
    grad_b: Grads = [dys[i].sum(0) if needs else None for i, needs in enumerate(needs_b)]
    grad_w: Grads = [None] * len(weights)
    masters: Grads = []
    if not ctx.needs_x:
        dx = torch.ops.lora.frozen_linear_backward(dys, weights, ctx.formats) if needs_x else None
    else:
        found = torch.ops.lora.fused_linear_backward(
            dys, x, None, False, h, weights, ctx.formats, A_cast, B_cast, scales, ctx.dropout, seed, needs_x
        )
        dx = found.pop() if needs_x else None
        grad_w = _weight_gradients(dys, x, None, False, needs_w)
        masters = _master_gradients(found, ctx.masters)
    grad_A, grad_B = masters[: len(masters) // 2], masters[len(masters) // 2 :]
    return dx, grad_w, None, grad_b, grad_A, grad_B, None, [None] * len(B_cast), None, None, None


def _master_gradients(found: list[Tensor], masters: list[tuple[torch.Size, torch.dtype]]) -> Grads:
    """The gradients of every A, then of every B, in their own dtypes, from [dA, dB_i ...] stacked by target."""
    dA, *dBs = found
    shapes_A, shapes_B = masters[: len(masters) // 2], iter(masters[len(masters) // 2 :])
    if not shapes_A:
        return []
    ranks = [shape[0] for shape, _ in shapes_A]
    grads: Grads = [part.to(dtype) for part, (_, dtype) in zip(dA.split(ranks), shapes_A, strict=True)]
    for dB in dBs:
        start = 0
        while start < dB.shape[1]:
            shape, dtype = next(shapes_B)
            grads.append(dB[:, start : start + shape[1]].to(dtype))
            start += shape[1]
    return grads


def _weight_gradients(dys: list[Tensor], x: Tensor, factor: Tensor | None, silu: bool, needs: Sequence[bool]) -> Grads:
    """dW_i = dy_i^T x where a dense W0 trains; a quantised one cannot, and its tensors are not one to a target."""
    if not any(needs):
        return [None] * len(needs)
    if factor is not None:
        x = Factors(x, factor, silu).product()
    return [dys[i].t() @ x if need else None for i, need in enumerate(needs)]


LIBRARY.impl("fused_linear", forward, "CPU")
LIBRARY.impl("fused_linear_backward", backward, "CPU")
LIBRARY.impl("fused_linear", forward, "CUDA")
LIBRARY.impl("fused_linear_backward", backward, "CUDA")
LIBRARY.impl("frozen_linear_backward", frozen_backward, "CPU")
LIBRARY.impl("frozen_linear_backward", frozen_backward, "CUDA")
torch.library.register_fake("lora::frozen_linear_backward", _fake_frozen_backward, lib=LIBRARY)
torch.library.register_fake("lora::fused_linear", _fake, lib=LIBRARY)
torch.library.register_fake("lora::fused_linear_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("lora::fused_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
