# mypy: disable-error-code="no-untyped-call"
# torch.library's registration functions carry no types.
"""lora_linear as one operator: several linears of one input, their low-rank updates, dropout by seed.

    h = scales / (1 - p) * (mask * x) A^T                       (n, R)    A: every target's and adapter's, stacked
    y_i = x W_i^T + b_i + h_i B_i^T                             (n, N_i)  h_i: the target's columns of h
    g_i = scales_i / (1 - p) * dy_i B_i                         (n, R_i)
    dA = g^T (mask * x),  dB_i = dy_i^T h_i,  dx = sum of dy_i W_i + mask * (g A)

Saved for the backward pass: h, and x where `recompute.recipe` cannot make it again. The mask comes again from the seed,
and a quantised weight is dequantised again: `Matrices` makes one of them dense at a time. The functions here are the
plain-torch form, which is the CPU path and the oracle; `kernels/linear.py` is the CUDA path.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dequantise import Format, dequantise
from .philox import draw_seed, inverse_keep, keep_mask, threshold
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


class Matrices:
    """The weights W_i of one call, by target; a quantised one is dense only while the caller holds it.

    Args:
        tensors: what stores them, one after the other; formats: their `dequantise.Format`s, joined by ";", or "" where
            each is a plain matrix; dtype: of the matrices.
    """

    def __init__(self, tensors: Sequence[Tensor], formats: str, dtype: torch.dtype) -> None:
        self.tensors, self.dtype = tensors, dtype
        self.formats = formats.split(";") if formats else []

    def __len__(self) -> int:
        return len(self.formats) or len(self.tensors)

    def shape(self, target: int) -> tuple[int, int]:
        """(out, in)"""
        if self.formats:
            return Format.parse(self.formats[target]).shape
        out_features, in_features = self.tensors[target].shape
        return out_features, in_features

    def __getitem__(self, target: int) -> Tensor:
        if not self.formats:
            return self.tensors[target]
        sizes = [Format.parse(f).tensors for f in self.formats[: target + 1]]
        end = sum(sizes)
        return dequantise(self.tensors[end - sizes[-1] : end], self.formats[target], self.dtype)


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
    outputs = torch.ops.lora.fused_linear(
        rows, list(weights), formats, list(biases or []), flat_A, flat_B, copies.A, copies.B, copies.scales, dropout,
        seed,
    )  # fmt: skip
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs[: len(B)]]


# The operator on the CPU, and wherever else nothing faster is registered.


def _columns(B: list[Tensor]) -> list[int]:
    return [b.shape[1] for b in B]


def _masked(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    return x if seed is None else x * keep_mask(seed, x.shape[0], x.shape[1], dropout)


def _gradient_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _scale(scales: Tensor, dropout: float, seed: Tensor | None, like: Tensor) -> Tensor:
    return (scales * (1.0 if seed is None else inverse_keep(dropout))).to(_gradient_dtype(like))


def _reference(
    x: Tensor, weights: list[Tensor], formats: str, biases: list[Tensor], A: list[Tensor], B: list[Tensor],
    A_cast: Tensor, B_cast: list[Tensor], scales: Tensor, dropout: float, seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    matrices = Matrices(weights, formats, x.dtype)
    rank = A_cast.shape[0]
    h = x.new_zeros(x.shape[0], -(-rank // 8) * 8)
    h[:, :rank] = (_masked(x, dropout, seed) @ A_cast.t()) * _scale(scales, dropout, seed, x)
    ys = []
    for i, (b, part) in enumerate(zip(B_cast, h[:, :rank].split(_columns(B_cast), 1), strict=True)):
        y = torch.nn.functional.linear(x, matrices[i], biases[i] if biases else None)
        ys.append(y.addmm_(part, b.t()))
    return [*ys, h]


def _reference_backward(
    dys: list[Tensor], x: Tensor, factor: Tensor | None, silu: bool, h: Tensor, weights: list[Tensor], formats: str,
    A_cast: Tensor, B_cast: list[Tensor], scales: Tensor, dropout: float, seed: Tensor | None, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    if factor is not None:
        x = Factors(x, factor, silu).product()
    matrices = Matrices(weights, formats, x.dtype)
    rank, dtype = A_cast.shape[0], _gradient_dtype(x)
    g = torch.cat([dy @ b for dy, b in zip(dys, B_cast, strict=True)], 1)
    g = (g * _scale(scales, dropout, seed, x)).to(x.dtype)
    dA = (g.t() @ _masked(x, dropout, seed)).to(dtype)
    parts = h[:, :rank].split(_columns(B_cast), 1)
    dBs = [(dy.t() @ part).to(dtype) for dy, part in zip(dys, parts, strict=True)]
    if not needs_dx:
        return [dA, *dBs]
    dx = _masked(g @ A_cast, dropout, seed)
    for i, dy in enumerate(dys):
        dx = dx.addmm_(dy, matrices[i])
    return [dA, *dBs, dx]


# On CUDA.


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _dropout_numbers(dropout: float, seed: Tensor | None) -> tuple[float, Tensor | None, int]:
    return (1.0, None, 0) if seed is None else (inverse_keep(dropout), seed, threshold(dropout))


def _rows(t: Tensor) -> Tensor:
    """As the kernels read it: unit column stride, rows apart by at least their length."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def _cuda(
    x: Tensor, weights: list[Tensor], formats: str, biases: list[Tensor], A: list[Tensor], B: list[Tensor],
    A_cast: Tensor, B_cast: list[Tensor], scales: Tensor, dropout: float, seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    if x.element_size() != 2 or not _has_triton():
        return _reference(x, weights, formats, biases, A, B, A_cast, B_cast, scales, dropout, seed)
    from ..kernels import linear

    with torch.cuda.device_of(x):
        return linear.forward(
            _rows(x), Matrices(weights, formats, x.dtype), biases, A_cast, B_cast, scales,
            *_dropout_numbers(dropout, seed),
        )  # fmt: skip


def _cuda_backward(
    dys: list[Tensor], x: Tensor, factor: Tensor | None, silu: bool, h: Tensor, weights: list[Tensor], formats: str,
    A_cast: Tensor, B_cast: list[Tensor], scales: Tensor, dropout: float, seed: Tensor | None, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    if x.element_size() != 2 or not _has_triton():
        return _reference_backward(
            dys, x, factor, silu, h, weights, formats, A_cast, B_cast, scales, dropout, seed, needs_dx
        )
    from ..kernels import linear

    with torch.cuda.device_of(x):
        return linear.backward(
            [_rows(dy) for dy in dys], _rows(x), factor, silu, h, Matrices(weights, formats, x.dtype), A_cast, B_cast,
            scales, *_dropout_numbers(dropout, seed), needs_dx,
        )  # fmt: skip


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
    dtype = _gradient_dtype(x)
    grads = [t.new_empty(t.shape, dtype=dtype) for t in (A_cast, *B_cast)]
    return [*grads, x.new_empty(x.shape)] if needs_dx else grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, formats, biases, A, B, A_cast, B_cast, scales, dropout, seed = inputs
    h = output[-1]
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.recipe = recipe(x)
    ctx.save_for_backward(x if ctx.recipe is None else None, h, A_cast, scales, seed, *weights, *B_cast)
    ctx.dropout, ctx.tensors, ctx.formats, ctx.has_bias = dropout, len(weights), formats, bool(biases)
    ctx.masters = [(t.shape, t.dtype) for t in (*A, *B)]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, h, A_cast, scales, seed, *rest = ctx.saved_tensors
    weights, B_cast = rest[: ctx.tensors], rest[ctx.tensors :]
    x, factor, silu = (x, None, False) if ctx.recipe is None else ctx.recipe.factors()
    dys = [x.new_zeros(x.shape[0], b.shape[0]) if dy is None else dy for dy, b in zip(grads, B_cast, strict=False)]
    needs_x, needs_w, _, needs_b = ctx.needs_input_grad[:4]
    dA, *dBs = torch.ops.lora.fused_linear_backward(
        dys, x, factor, silu, h, weights, ctx.formats, A_cast, B_cast, scales, ctx.dropout, seed, needs_x
    )
    dx = dBs.pop() if needs_x else None
    shapes = ctx.masters[: len(ctx.masters) // 2]
    ranks = [shape[0] for shape, _ in shapes]
    grad_A = [part.to(dtype) for part, (_, dtype) in zip(dA.split(ranks), shapes, strict=True)]
    grad_B, adapters = [], iter(ctx.masters[len(shapes) :])
    for dB in dBs:
        start = 0
        while start < dB.shape[1]:
            shape, dtype = next(adapters)
            grad_B.append(dB[:, start : start + shape[1]].to(dtype))
            start += shape[1]
    # A quantised weight is no leaf that could train, and its tensors are not one to a target.
    if factor is not None and any(needs_w):
        x = Factors(x, factor, silu).product()
    grad_w = [dys[i].t() @ x if needs else None for i, needs in enumerate(needs_w)]
    grad_b = [dy.sum(0) if needs else None for dy, needs in zip(dys, needs_b, strict=True)] if ctx.has_bias else []
    return dx, grad_w, None, grad_b, grad_A, grad_B, None, [None] * len(B_cast), None, None, None


LIBRARY.impl("fused_linear", _reference, "CPU")
LIBRARY.impl("fused_linear_backward", _reference_backward, "CPU")
LIBRARY.impl("fused_linear", _cuda, "CUDA")
LIBRARY.impl("fused_linear_backward", _cuda_backward, "CUDA")
torch.library.register_fake("lora::fused_linear", _fake, lib=LIBRARY)
torch.library.register_fake("lora::fused_linear_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("lora::fused_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
