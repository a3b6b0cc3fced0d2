"""lora_linear as one operator: several linears of one input, their low-rank updates, dropout by seed.

    h = scales / (1 - p) * (mask * x) A^T                       (n, R)    A: every target's and adapter's, stacked
    y_i = x W_i^T + b_i + h_i B_i^T                             (n, N_i)  h_i: the target's columns of h
    g_i = scales_i / (1 - p) * dy_i B_i                         (n, R_i)
    dA = g^T (mask * x),  dB_i = dy_i^T h_i,  dx = sum of dy_i W_i + mask * (g A)

Saved for the backward pass: h, and x where `recompute.remake` cannot make it again. The mask comes again from the seed,
and a quantized weight is dequantized again. `dispatch.py` computes; eager calls go past the operator, by `autograd.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd
from .call import Call, Matrices, gradient_dtype, thin
from .dispatch import form
from .library import define
from .philox import draw_seed

CALL = "Tensor[] weights, str formats, Tensor A_cast, Tensor[] B_cast, Tensor scales, float dropout, Tensor? seed"


def rebuild(x: Tensor, weights: list[Tensor], formats: str, *rest: Any) -> Call:
    """The call that the schema has as CALL; x has the dtype that it computes in."""
    return Call(Matrices(weights, formats, x.dtype), *rest)


def make_copies(
    A: Sequence[Sequence[Tensor]], B: Sequence[Sequence[Tensor]], scalings: Sequence[Sequence[float]],
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """`Call`'s A, B and scales, in the compute dtype; each argument is indexed by target, then by adapter.

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
    numbers = [s for target in scalings for s in target]
    if len(set(numbers)) == 1:
        return stacked, joined, stacked.new_full((sum(ranks),), numbers[0], dtype=torch.float32)
    parts = [stacked.new_full((r,), s, dtype=torch.float32) for r, s in zip(ranks, numbers, strict=True)]
    return stacked, joined, torch.cat(parts)


def fused_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]], scalings: Sequence[Sequence[float]], dropout: float = 0.0,
    seed: Tensor | None = None, formats: str = "",
) -> list[Tensor]:  # fmt: skip
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
    autograd.refuse_transforms()
    rows = x.reshape(-1, x.shape[-1])
    flat_A, flat_B = [a for target in A for a in target], [b for target in B for b in target]
    copies = make_copies(A, B, scalings, x.dtype)
    if not dropout:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    flat = list(weights), formats, *copies, dropout, seed
    biases = list(biases or [])
    if autograd.is_plain(x):
        call = rebuild(x, *flat)
        h, *places = autograd.Held.apply(call, rows, *([] if formats else weights), *flat_A, *flat_B)
        outputs = autograd.Products.apply(call, (rows, h), len(biases), *biases, *places)
    else:
        outputs = torch.ops.lora.fused_linear(rows, biases, flat_A, flat_B, *flat)[:-1]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


# What the operator runs, on every device.


def _run(x: Tensor, biases: list[Tensor], A: list[Tensor], B: list[Tensor], *flat: Any) -> list[Tensor]:
    """[y_i ..., h]"""
    call, made = rebuild(x, *flat), form(x)
    h = made.hidden(x, call)
    return [*made.products(x, h, call, biases), h]


def _run_backward(dys: list[Tensor], x: Tensor, h: Tensor, needs_dx: bool, *flat: Any) -> list[Tensor]:
    found: list[Tensor] = form(h).backward(dys, x, h, rebuild(x, *flat), needs_dx)
    return found


# Shapes, and gradients.


def _fake(x: Tensor, biases: list[Tensor], A: list[Tensor], B: list[Tensor], *flat: Any) -> list[Tensor]:
    _, _, A_cast, B_cast, *_ = flat
    return [*(x.new_empty(x.shape[0], b.shape[0]) for b in B_cast), thin(x, A_cast.shape[0])]


def _fake_backward(dys: list[Tensor], x: Tensor, h: Tensor, needs_dx: bool, *flat: Any) -> list[Tensor]:
    _, _, A_cast, B_cast, *_ = flat
    grads = [t.new_empty(t.shape, dtype=gradient_dtype(x)) for t in (A_cast, *B_cast)]
    return [*grads, x.new_empty(x.shape)] if needs_dx else grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, _, A, B, weights, formats, A_cast, B_cast, scales, dropout, seed = inputs
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)
    # What eager calls save: a checkpoint may run its two forward passes by different ways.
    ctx.save_for_backward(x, output[-1], A_cast, scales, seed, *B_cast)
    ctx.dropout, ctx.weights, ctx.formats = dropout, weights, formats
    ctx.masters = [(t.shape, t.dtype) for t in (*A, *B)]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    needs_x, needs_b, _, _, needs_w, *_ = ctx.needs_input_grad
    x, h, A_cast, scales, seed, *B_cast = ctx.saved_tensors
    dys = autograd.filled(grads[:-1], B_cast)
    nothing = None, None, [None] * len(B_cast), None, None, None  # formats, A_cast, B_cast, scales, dropout, seed
    half = len(ctx.masters) // 2
    if not dys:
        return None, [None] * len(needs_b), [None] * half, [None] * half, [None] * len(needs_w), *nothing
    found = torch.ops.lora.fused_linear_backward(
        dys, x, h, needs_x, ctx.weights, ctx.formats, A_cast, B_cast, scales, ctx.dropout, seed
    )
    dx = found.pop() if needs_x else None
    masters = autograd.master_gradients(found, ctx.masters)
    grad_w = autograd.weight_gradients(dys, x, needs_w)
    return dx, autograd.bias_gradients(dys, needs_b), masters[:half], masters[half:], grad_w, *nothing


SCHEMA = f"fused_linear(Tensor x, Tensor[] biases, Tensor[] A, Tensor[] B, {CALL}) -> Tensor[]"
SCHEMA_BACKWARD = f"fused_linear_backward(Tensor[] dys, Tensor x, Tensor h, bool needs_dx, {CALL}) -> Tensor[]"
define(SCHEMA, _run, _fake, _backward, _setup_context)
define(SCHEMA_BACKWARD, _run_backward, _fake_backward)
