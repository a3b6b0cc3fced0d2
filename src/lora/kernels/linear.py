# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,no-untyped-call,untyped-decorator"
# Triton is optional and a kernel is a program in its own language: neither carries Python types.
"""lora_linear on CUDA: the launches of one forward and one backward pass, and the rule that picks the plan."""

import contextlib
import functools
import itertools
from typing import Protocol

import torch
from torch import Tensor

from .expand import expand_
from .gemm import can_describe, gemm_
from .gradients import gradients_
from .masked_copy import dropped
from .outer import outer_
from .product import product
from .shrink import shrink_
from .tuning import GRADIENTS, card

SMALL = 2048
"""Rows under which a call is taken to be bound by its launches, of which cuBLAS on one stream has the fewest. As CUDA
graphs, r = 16, our kernels on two streams are 2 to 7 % ahead at 2048 rows, 8 % ahead to even at 1024 and 8 % ahead to
6 % behind at 512; without a graph Python takes longer than any of them."""

SHRINK_RANKS, OUTER_RANKS = 64, 32
"""Ranks up to which our shrink, and our outer for dA, beat cuBLAS (measured at 16, 64 and 128)."""

MASKED_RANKS = 64
"""Ranks up to which, under dropout, these two draw the mask themselves; for more they would draw it once for each block
of ranks, and read a masked copy instead (measured at 64 and 96)."""


def fuses(x: Tensor, weight: Tensor, *thin: Tensor) -> bool:
    """The rule: whether the Triton GEMM with the low-rank term in its accumulator computes dx.

    Measured on one H200 (8192 rows, bf16, r = 16): it is 2 to 3 % over cuBLAS's bare product at 4096 -> 4096, 14336 and
    14336 -> 4096, where cuBLAS with the term added first (beta = 1) is 3 to 8 % over. Elsewhere (no Hopper, few rows
    for the narrower side, strides that TMA cannot read) cuBLAS has it.
    """
    major, processors, _ = card(x.device)
    return (
        major == 9
        and (x.shape[0] // 128) * (min(weight.shape) // 256) * 2 >= processors
        and can_describe(x, weight, *thin)
    )


def reads_once(dy: Tensor, rank: int) -> bool:
    """The rule: whether one kernel takes dy B and dB from one read of dy.

    Measured on one H200 (8192 rows, 1024 to 14336 columns): at r = 16 and 32 it takes 65 to 82 % of the time of two
    passes, at 64 98 to 115 %. Its partial sums grow with dy and would leave L2. On other cards the compiler keeps no
    load of it in flight, so there the two passes stay, with cuBLAS for dB.
    """
    fits = dy.shape[0] >= SMALL and dy.numel() <= 2**27 and rank <= max(GRADIENTS)
    return fits and card(dy.device).major == 9


class Weights(Protocol):
    """Weights (out, in) by target; a quantized one is made dense when asked for, so hold no more than one."""

    def __getitem__(self, target: int) -> Tensor: ...
    def rows(self, target: int) -> int: ...


def segments(B: list[Tensor]) -> list[slice]:
    """The columns of h that belong to each target."""
    ends = [0]
    for b in B:
        ends.append(ends[-1] + b.shape[1])
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def hidden(
    x: Tensor, A: Tensor, scales: Tensor, inv_keep: float, seed: Tensor | None, threshold: int
) -> Tensor:  # fmt: skip
    """h = scales * inv_keep * dropout(x) A^T, (n, R padded to 8) from x (n, K) and A (R, K)."""
    rank = A.shape[0]
    h = _thin(x, rank)
    _shrink_(h[:, :rank], x, A, scales, inv_keep, seed, threshold)
    return h


def products(x: Tensor, h: Tensor, weights: Weights, biases: list[Tensor], B: list[Tensor]) -> list[Tensor]:
    """y_i = x W_i^T + b_i + h_i B_i^T for B_i (N_i, R_i), h_i their columns of h."""
    ys = []
    for i, (b, columns) in enumerate(zip(B, segments(B), strict=True)):
        # cuBLAS, and not the Triton GEMM: its bits are the base's own where the update is zero, and in a whole step it
        # is as fast. The thin product first and the large one into it is 8 us faster than the other way at 8192 x 4096;
        # with a bias it would round otherwise than the base does, so there the base's product comes first.
        h_i = h[:, columns]
        if biases:
            ys.append(torch.nn.functional.linear(x, weights[i], biases[i]).addmm_(h_i, b.t()))
        else:
            ys.append((h_i @ b.t()).addmm_(x, weights[i].t()))
    return ys


def backward(
    dys: list[Tensor], x: Tensor, factor: Tensor | None, silu: bool, h: Tensor, weights: Weights, A: Tensor,
    B: list[Tensor], scales: Tensor, inv_keep: float, seed: Tensor | None, threshold: int, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """[dA, dB_i ..., dx if needed]; dA (R, K) and dB_i (N_i, R_i) in fp32, dx in x's dtype, summed over the targets.

    Where there is a factor, the input was its product with x, or with silu(x).
    """
    columns = segments(B)
    g = _thin(x, A.shape[0])  # scales * inv_keep * dy B, (n, R)
    dA = torch.empty(A.shape, device=x.device, dtype=torch.float32)
    dBs = [torch.empty(b.shape, device=x.device, dtype=torch.float32) for b in B]
    later = []
    for dy, b, dB, part in zip(dys, B, dBs, columns, strict=True):
        if reads_once(dy, b.shape[1]):
            gradients_(g[:, part], dB, dy, h[:, part], b, scales[part], inv_keep)
        else:
            _shrink_(g[:, part], dy, b.t(), scales[part], inv_keep, None, 0)
            later.append((dB, dy, h[:, part]))
    g = g[:, : A.shape[0]]
    dx = torch.empty_like(x) if needs_dx else None
    main = torch.cuda.current_stream(x.device)
    side = main if x.shape[0] < SMALL else _side_stream(x.device)
    ready = main.record_event() if side is not main else None
    if dx is not None:
        _dx_(dx, dys, weights, g, A, seed, threshold)
    # Beside the large products, whose last wave of tiles leaves a quarter of the card idle; what is made again here
    # stays with this stream, so that its memory is not given away before it is read.
    with torch.cuda.stream(side) if ready is not None else contextlib.nullcontext():
        if ready is not None:
            side.wait_event(ready)
        if factor is not None:
            x = product(x, factor, silu)
        _outer_(dA, g, x, seed, threshold)
        for dB, dy, part_of_h in later:
            _outer_(dB, dy, part_of_h)
    if ready is not None:
        main.wait_stream(side)
    return [dA, *dBs] + ([dx] if dx is not None else [])


def _dx_(
    dx: Tensor, dys: list[Tensor], weights: Weights, g: Tensor, A: Tensor, seed: Tensor | None, threshold: int
) -> None:
    """dx = mask * (g A) + sum of dy_i W_i: the low-rank part and the first product in one, the others on top of it.

    Under dropout the masked part is written first and cuBLAS adds to it: measured as fast as a mask inside the GEMM at
    4096 x 4096, and 4 % faster at 14336 x 4096.
    """
    first = max(range(len(dys)), key=weights.rows)
    if seed is not None:
        expand_(dx, g, A, seed, threshold)
        done = -1
    else:
        w = weights[first]
        if fuses(dys[first], w, g, A, dx):
            gemm_(dx, dys[first], w, g, A)
        else:
            torch.mm(g, A, out=dx).addmm_(dys[first], w)
        done = first
        del w
    for i, dy in enumerate(dys):
        if i != done:
            dx.addmm_(dy, weights[i])


def _shrink_(
    out: Tensor, x: Tensor, w: Tensor, scales: Tensor, inv_keep: float, seed: Tensor | None, threshold: int
) -> None:
    """out = scales * inv_keep * dropout(x) w^T; cuBLAS for few rows and for many ranks."""
    if seed is not None and w.shape[0] > MASKED_RANKS:
        x, seed = dropped(x, seed, threshold), None
    if seed is None and (x.shape[0] < SMALL or w.shape[0] > SHRINK_RANKS):
        torch.mul(x @ w.t(), scales if inv_keep == 1 else scales * inv_keep, out=out)
    else:
        shrink_(out, x, w, scales, seed, threshold, inv_keep)


def _outer_(out: Tensor, p: Tensor, x: Tensor, seed: Tensor | None = None, threshold: int = 0) -> None:
    """out = p^T dropout(x) in fp32; cuBLAS for few rows and where p is not thin."""
    if seed is not None and p.shape[1] > MASKED_RANKS:
        x, seed = dropped(x, seed, threshold), None
    if seed is None and p.shape[0] and (p.shape[0] < SMALL or p.shape[1] > OUTER_RANKS):
        torch.mm(p.t(), x, out_dtype=torch.float32, out=out)
    else:
        outer_(out, p, x, seed, threshold)


def _thin(x: Tensor, rank: int) -> Tensor:
    """An (n, R) buffer whose rows start on 16 bytes, as TMA wants."""
    padded = -(-rank // 8) * 8
    return (x.new_empty if padded == rank else x.new_zeros)(x.shape[0], padded)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
