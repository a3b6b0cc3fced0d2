# mypy: disable-error-code="no-untyped-call"
# torch.library's registration functions carry no types.
"""lora_linear as one operator: several linears of one input, their low-rank updates, dropout by seed.

    h = scales / (1 - p) * (mask * x) A^T                       (n, R)    A: every target's and adapter's, stacked
    y_i = x W_i^T + b_i + h_i B_i^T                             (n, N_i)  h_i: the target's columns of h
    g_i = scales_i / (1 - p) * dy_i B_i                         (n, R_i)
    dA = g^T (mask * x),  dB_i = dy_i^T h_i,  dx = sum of dy_i W_i + mask * (g A)

Saved for the backward pass: h, and x where `recompute.remake` cannot make it again. The mask comes again from the seed,
and a quantized weight is dequantized again. `reference.py` computes: in plain torch, the CPU path and the oracle, or
with `kernels/linear.py` on CUDA.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import (
    Call,
    Grads,
    Held,
    Products,
    filled,
    is_plain,
    master_gradients,
    refuse_transforms,
    weight_gradients,
)
from .philox import draw_seed
from .reference import Matrices, backward, gradient_dtype, hidden, products

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
        formats: "", or how `weights` store the matrices where they are quantized, as `Matrices` has it.
        A, B, scalings: by target, then by adapter: (r, in), (out_i, r) and a number. Gradients go to these, in their
            own dtype, from fp32 sums.
        dropout: one probability and one mask for all of them; seed: (1,) int64 on x's device, drawn if None.

    Returns:
        (..., out_i) for each target.

    Raises:
        LoraError: within a transform of torch.func, whose derivatives would be wrong.
    """
    refuse_transforms()
    rows = x.reshape(-1, x.shape[-1])
    flat_A, flat_B = [a for target in A for a in target], [b for target in B for b in target]
    copies = make_copies(A, B, scalings, x.dtype)
    if not dropout:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    weights, biases = list(weights), list(biases or [])
    if is_plain(x):
        matrices = Matrices(weights, formats, x.dtype)
        dense = [] if formats else weights
        h = Held.apply(copies.A, copies.B, copies.scales, dropout, seed, rows, *dense, *flat_A, *flat_B)
        sizes = [len(dense), len(biases), len(flat_A), len(flat_B)]
        call = Call(matrices, dropout, copies.B, sizes, h.grad_fn)
        outputs = Products.apply(call, h, rows, *dense, *biases, *flat_A, *flat_B)
    else:
        outputs = torch.ops.lora.fused_linear(
            rows, weights, formats, biases, flat_A, flat_B, copies.A, copies.B, copies.scales, dropout, seed
        )
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs[: len(B)]]


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, formats, _, A, B, A_cast, B_cast, scales, dropout, seed = inputs
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)
    # What eager calls save: a checkpoint may run its two forward passes by different ways.
    ctx.save_for_backward(x, output[-1], A_cast, scales, seed, *B_cast)
    ctx.dropout, ctx.weights, ctx.formats = dropout, weights, formats
    ctx.masters = [(t.shape, t.dtype) for t in (*A, *B)]
    ctx.targets = [b.shape[0] for b in B_cast]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    needs_x, needs_w, _, needs_b = ctx.needs_input_grad[:4]
    nothing = [None] * len(ctx.targets)
    dys = filled(grads[:-1], ctx.targets)
    if not dys:
        return None, [None] * len(needs_w), None, [None] * len(needs_b), *_masters(ctx, []), None, nothing, *[None] * 3
    grad_b: Grads = [dys[i].sum(0) if needs else None for i, needs in enumerate(needs_b)]
    x, h, A_cast, scales, seed, *B_cast = ctx.saved_tensors
    found = torch.ops.lora.fused_linear_backward(
        dys, x, None, False, h, ctx.weights, ctx.formats, A_cast, B_cast, scales, ctx.dropout, seed, needs_x
    )
    dx = found.pop() if needs_x else None
    grad_w = weight_gradients(dys, x, None, False, needs_w)
    return dx, grad_w, None, grad_b, *_masters(ctx, found), None, nothing, *[None] * 3


def _masters(ctx: Any, found: list[Tensor]) -> tuple[Grads, Grads]:
    """The gradients of A and of B; none where no output was used."""
    grads: Grads = master_gradients(found, ctx.masters) if found else [None] * len(ctx.masters)
    return grads[: len(grads) // 2], grads[len(grads) // 2 :]


# What the operator runs, on every device.


def _run(
    x: Tensor, weights: list[Tensor], formats: str, biases: list[Tensor], A: list[Tensor], B: list[Tensor],
    A_cast: Tensor, B_cast: list[Tensor], scales: Tensor, dropout: float, seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """[y_i ..., h]"""
    h = hidden(x, A_cast, scales, dropout, seed)
    return [*products(x, h, Matrices(weights, formats, x.dtype), biases, B_cast), h]


def _run_backward(
    dys: list[Tensor], x: Tensor, factor: Tensor | None, silu: bool, h: Tensor, weights: list[Tensor], formats: str,
    A_cast: Tensor, B_cast: list[Tensor], scales: Tensor, dropout: float, seed: Tensor | None, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    matrices = Matrices(weights, formats, x.dtype)
    return backward(dys, x, factor, silu, h, matrices, A_cast, B_cast, scales, dropout, seed, needs_dx)


for device in ("CPU", "CUDA"):
    LIBRARY.impl("fused_linear", _run, device)
    LIBRARY.impl("fused_linear_backward", _run_backward, device)
torch.library.register_fake("lora::fused_linear", _fake, lib=LIBRARY)
torch.library.register_fake("lora::fused_linear_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("lora::fused_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
