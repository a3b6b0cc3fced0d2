"""lora_linear on CUDA: the launches of one forward and one backward pass, as `plan.py` has them, chosen nowhere else.

Imported where a call comes to the kernels, since only then triton is needed.
"""

import contextlib
import functools

import torch
from torch import Tensor

from ..kernels.copies import dropped, product
from ..kernels.expand import expand_
from ..kernels.gemm import can_describe, gemm_
from ..kernels.gradients import gradients_
from ..kernels.outer import outer_
from ..kernels.shrink import shrink_
from ..kernels.tuning import card
from .call import Call, as_rows, thin
from .philox import inverse_keep, threshold
from .plan import ONCE, TRITON, Shape, Steps, plan
from .recompute import Factors

Mask = tuple[float, Tensor | None, int]
"""1 / (1 - p), the seed, the probability out of 65536."""

NO_MASK: Mask = (1.0, None, 0)


def hidden(x: Tensor, call: Call) -> Tensor:
    """h = scales / (1 - p) * dropout(x) A^T, (n, R) padded, from x (n, K)."""
    x, rank = as_rows(x), call.A.shape[0]
    h = thin(x, rank)
    with torch.cuda.device_of(x):
        shrink_step_(steps_of(x, call).hidden.engine, h[:, :rank], x, call.A, call.scales, mask_of(call))
    return h


def products(x: Tensor, h: Tensor, call: Call, biases: list[Tensor]) -> list[Tensor]:
    """y_i = x W_i^T + b_i + h_i B_i^T for B_i (N_i, R_i), h_i their columns of h."""
    x, ys = as_rows(x), []
    for i, (b, columns) in enumerate(zip(call.B, call.columns(), strict=True)):
        # cuBLAS, and not the Triton GEMM: its bits are the base's own where the update is zero, and in a whole step it
        # is as fast. The thin product first and the large one into it is faster than the other way; with a bias it
        # would round otherwise than the base does, so there the base's product comes first.
        if biases:
            ys.append(torch.nn.functional.linear(x, call.matrices[i], biases[i]).addmm_(h[:, columns], b.t()))
        else:
            ys.append((h[:, columns] @ b.t()).addmm_(x, call.matrices[i].t()))
    return ys


def backward(dys: list[Tensor], x: Tensor | Factors, h: Tensor, call: Call, needs_dx: bool) -> list[Tensor]:
    """[dA, dB_i ..., dx if needed]; dA (R, K) and dB_i (N_i, R_i) in fp32, dx in x's dtype, summed over the targets."""
    x = x if isinstance(x, Factors) else as_rows(x)
    dys = [as_rows(dy) for dy in dys]
    with torch.cuda.device_of(h):
        left = x.left if isinstance(x, Factors) else x
        steps = steps_of(left, call, dys)
        rank, columns, mask = call.A.shape[0], call.columns(), mask_of(call)
        g = thin(left, rank)[:, :rank]  # scales / (1 - p) * dy B
        dA = torch.empty(call.A.shape, device=g.device, dtype=torch.float32)
        dBs = [torch.empty(b.shape, device=g.device, dtype=torch.float32) for b in call.B]
        for dy, b, dB, part, step in zip(dys, call.B, dBs, columns, steps.dyB, strict=True):
            if step.engine == ONCE:
                gradients_(g[:, part], dB, dy, h[:, part], b, call.scales[part], mask[0])
            else:
                shrink_step_(step.engine, g[:, part], dy, b.t(), call.scales[part], (mask[0], None, 0))
        dx = left.new_empty(left.shape) if needs_dx else None
        main = torch.cuda.current_stream(left.device)
        side = _side_stream(left.device) if steps.two_streams else main
        ready = main.record_event() if steps.two_streams else None
        if dx is not None:
            dx_step_(steps.dx.engine, dx, dys, call, g)
        # Beside the large products, whose last wave of tiles leaves a quarter of the card idle; what is made again
        # here stays with this stream, so that its memory is not given away before it is read.
        with torch.cuda.stream(side) if ready is not None else contextlib.nullcontext():
            if ready is not None:
                side.wait_event(ready)
            outer_step_(steps.dA.engine, dA, g, product(*x) if isinstance(x, Factors) else x, mask)
            for dy, dB, part, step in zip(dys, dBs, columns, steps.dB, strict=True):
                if step.engine != ONCE:
                    outer_step_(step.engine, dB, dy, h[:, part])
        if ready is not None:
            main.wait_stream(side)
        return [dA, *dBs] + ([dx] if dx is not None else [])


def steps_of(x: Tensor, call: Call, dys: list[Tensor] | None = None) -> Steps:
    """The plan for x (n, K); the backward pass asks with its dys, since its product reads one of them by TMA."""
    aligned = True
    if dys is not None:  # a dense weight made here, g and dx are aligned where A is, which is as wide as they are
        widest = call.widest()
        stored = [] if call.matrices.packed else [call.matrices[widest]]
        aligned = can_describe(dys[widest], call.A, *stored)
    major, processors, _ = card(x.device)
    targets = tuple([(b.shape[0], b.shape[1]) for b in call.B])
    rows, width = x.shape
    return plan(Shape(rows, width, targets, call.seed is not None, x.element_size(), major, processors, aligned))


def mask_of(call: Call) -> Mask:
    return NO_MASK if call.seed is None else (inverse_keep(call.dropout), call.seed, threshold(call.dropout))


def dx_step_(engine: str, dx: Tensor, dys: list[Tensor], call: Call, g: Tensor) -> None:
    """dx = mask * (g A) + sum of dy_i W_i: the low-rank part and the first product in one, the others on top of it."""
    done = -1
    if call.seed is not None:
        expand_(dx, g, call.A, call.seed, threshold(call.dropout))
    else:
        done = call.widest()
        if engine == TRITON:
            gemm_(dx, dys[done], call.matrices[done], g, call.A)
        else:
            torch.mm(g, call.A, out=dx).addmm_(dys[done], call.matrices[done])
    for i, dy in enumerate(dys):
        if i != done:
            dx.addmm_(dy, call.matrices[i])


def shrink_step_(engine: str, out: Tensor, x: Tensor, w: Tensor, scales: Tensor, mask: Mask) -> None:
    """out = scales / (1 - p) * dropout(x) w^T"""
    inv_keep, seed, limit = mask
    if engine == TRITON:
        shrink_(out, x, w, scales, seed, limit, inv_keep)
    else:
        x = x if seed is None else dropped(x, seed, limit)
        torch.mul(x @ w.t(), scales if inv_keep == 1 else scales * inv_keep, out=out)


def outer_step_(engine: str, out: Tensor, p: Tensor, x: Tensor, mask: Mask = NO_MASK) -> None:
    """out = p^T dropout(x) in fp32"""
    _, seed, limit = mask
    if engine == TRITON:
        outer_(out, p, x, seed, limit)
    else:
        x = x if seed is None else dropped(x, seed, limit)
        torch.mm(p.t(), x, out_dtype=torch.float32, out=out)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
