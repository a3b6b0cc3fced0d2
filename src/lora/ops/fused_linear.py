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

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fused_forms import Matrices, cuda, cuda_backward, frozen_backward, gradient_dtype, reference, reference_backward
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
    if flat_A:
        copies = make_copies(A, B, scalings, x.dtype)
    else:  # the frozen product alone
        outs = [Matrices(weights, formats, x.dtype).shape(i)[0] for i in range(len(B))]
        copies = Copies(x.new_empty(0, x.shape[-1]), [x.new_empty(n, 0) for n in outs], x.new_empty(0).float())
    if not dropout:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    weights, biases = list(weights), list(biases or [])
    if _plain(x):
        leaves = (*weights, *biases, *flat_A, *flat_B)
        sizes = [len(weights), len(biases), len(flat_A), len(flat_B)]
        outputs = _FusedLinear.apply((formats, copies.A, copies.B, copies.scales, dropout, seed), sizes, rows, *leaves)
    else:
        outputs = torch.ops.lora.fused_linear(
            rows, weights, formats, biases, flat_A, flat_B, copies.A, copies.B, copies.scales, dropout, seed
        )
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs[: len(B)]]


class _FusedLinear(torch.autograd.Function):
    """The operator without its dispatch, which costs 0.2 ms of Python a call: for eager calls on plain tensors."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], sizes: list[int], x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        formats, A_cast, B_cast, scales, dropout, seed = call
        weights, biases, A, B = _parts(list(leaves), sizes)
        form = cuda if x.is_cuda else reference
        outputs = form(x, weights, formats, biases, A, B, A_cast, B_cast, scales, dropout, seed)
        _save(ctx, (x, weights, formats, biases, A, B, A_cast, B_cast, scales, dropout, seed), outputs[-1])
        ctx.sizes = sizes
        return tuple(outputs[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_x, *needs = ctx.needs_input_grad[2:]
        needs_w, needs_b, _, _ = _parts(needs, ctx.sizes)
        form = cuda_backward if ctx.on_cuda else reference_backward
        dx, *grads = _gradients(ctx, list(dys), form, frozen_backward, needs_x, needs_w, needs_b)
        return None, None, dx, *(g for group in grads for g in group)


T = TypeVar("T")
Grads = list[Tensor | None]


def _parts(items: Sequence[T], sizes: list[int]) -> list[list[T]]:
    """Consecutive pieces of these sizes."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [list(items[a:b]) for a, b in itertools.pairwise(ends)]


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


def _save(ctx: Any, inputs: tuple[Any, ...], h: Tensor) -> None:
    x, weights, formats, _, A, B, A_cast, B_cast, scales, dropout, seed = inputs
    ctx.set_materialize_grads(False)
    ctx.on_cuda = x.is_cuda
    ctx.needs_x = bool(A) or any(w.requires_grad for w in weights)  # a frozen product alone saves no input
    ctx.recipe = recipe(x) if ctx.needs_x else None
    kept = x if ctx.needs_x and ctx.recipe is None else None
    ctx.save_for_backward(kept, h, A_cast, scales, seed, *weights, *B_cast)
    ctx.dropout, ctx.tensors, ctx.targets, ctx.formats = dropout, len(weights), len(B_cast), formats
    ctx.masters = [(t.shape, t.dtype) for t in (*A, *B)]


def _gradients(
    ctx: Any, grads: list[Tensor | None], form: Callable[..., list[Tensor]], frozen: Callable[..., Tensor],
    needs_x: bool, needs_w: Sequence[bool], needs_b: Sequence[bool],
) -> tuple[Tensor | None, Grads, Grads, Grads, Grads]:  # fmt: skip
    """(dx, and the gradients of the weights, biases, A and B)"""
    x, h, A_cast, scales, seed, *rest = ctx.saved_tensors
    weights, B_cast = rest[: ctx.tensors], rest[ctx.tensors :]
    dys = [h.new_zeros(h.shape[0], b.shape[0]) if dy is None else dy for dy, b in zip(grads, B_cast, strict=False)]
    grad_b: Grads = [dys[i].sum(0) if needs else None for i, needs in enumerate(needs_b)]
    if not ctx.needs_x:
        dx = frozen(dys, weights, ctx.formats) if needs_x else None
        return dx, [None] * len(weights), grad_b, [], []
    x, factor, silu = (x, None, False) if ctx.recipe is None else ctx.recipe.factors()
    dA, *dBs = form(dys, x, factor, silu, h, weights, ctx.formats, A_cast, B_cast, scales, ctx.dropout, seed, needs_x)
    dx = dBs.pop() if needs_x else None
    shapes = ctx.masters[: len(ctx.masters) // 2]
    ranks = [shape[0] for shape, _ in shapes]
    grad_A: Grads = [part.to(dtype) for part, (_, dtype) in zip(dA.split(ranks), shapes, strict=True)] if shapes else []
    grad_B: Grads = []
    adapters = iter(ctx.masters[len(shapes) :])
    for dB in dBs:
        start = 0
        while start < dB.shape[1]:
            shape, dtype = next(adapters)
            grad_B.append(dB[:, start : start + shape[1]].to(dtype))
            start += shape[1]
    if factor is not None and any(needs_w):
        x = Factors(x, factor, silu).product()
    # A quantised weight is no leaf that could train, and its tensors are not one to a target.
    grad_w: Grads = [dys[i].t() @ x if needs else None for i, needs in enumerate(needs_w)]
    return dx, grad_w, grad_b, grad_A, grad_B


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.mark_non_differentiable(output[-1])
    _save(ctx, inputs, output[-1])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    needs_x, needs_w, _, needs_b = ctx.needs_input_grad[:4]
    dx, grad_w, grad_b, grad_A, grad_B = _gradients(
        ctx, grads[:-1], torch.ops.lora.fused_linear_backward, torch.ops.lora.frozen_linear_backward, needs_x, needs_w,
        needs_b,
    )  # fmt: skip
    return dx, grad_w, None, grad_b, grad_A, grad_B, None, [None] * ctx.targets, None, None, None


LIBRARY.impl("fused_linear", reference, "CPU")
LIBRARY.impl("fused_linear_backward", reference_backward, "CPU")
LIBRARY.impl("fused_linear", cuda, "CUDA")
LIBRARY.impl("fused_linear_backward", cuda_backward, "CUDA")
LIBRARY.impl("frozen_linear_backward", frozen_backward, "CPU")
LIBRARY.impl("frozen_linear_backward", frozen_backward, "CUDA")
torch.library.register_fake("lora::frozen_linear_backward", _fake_frozen_backward, lib=LIBRARY)
torch.library.register_fake("lora::fused_linear", _fake, lib=LIBRARY)
torch.library.register_fake("lora::fused_linear_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("lora::fused_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
