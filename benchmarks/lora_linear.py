"""One LoRA linear, or a group that shares its input, forward and backward on one GPU: ours beside the frozen floor.

    PYTHONPATH=src python benchmarks/lora_linear.py --csv out.csv [--quick]

Every variant of a case is a captured CUDA graph over two input sets; the variants' replays alternate, so that the
card's clock drifts under all of them alike, and the median counts. A case is timed only after its gate: errors of y,
dx, dA and dB against float64 within twice plain torch's own in bf16, and two backward runs equal to the bit.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import write_csv
from on_gpu import race
from torch import Tensor

from lora.ops.operator import fused_linear
from lora.ops.philox import draw_seed, inverse_keep, keep_mask

DEVICE, DTYPE, SCALING = "cuda", torch.bfloat16, 2.0
GROUPS = {"q+k+v": (4096, (4096, 1024, 1024)), "gate+up": (4096, (14336, 14336))}
LONE = {
    "4096x4096": (4096, (4096,)),
    "4096x1024": (4096, (1024,)),
    "4096x14336": (4096, (14336,)),
    "14336x4096": (14336, (4096,)),
}


@dataclass
class Case:
    """Tensors of one shape: x and dy in two sets, frozen weights, fp32 masters."""

    xs: list[Tensor]
    dys: list[list[Tensor]]
    weights: list[Tensor]
    A: list[Tensor]
    B: list[Tensor]
    dropout: float

    @classmethod
    def draw(cls, rows: int, width: int, outs: tuple[int, ...], r: int, dropout: float) -> "Case":
        def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
            return torch.randn(*shape, device=DEVICE, dtype=dtype).mul_(scale)

        return cls(
            [random(rows, width).requires_grad_() for _ in range(2)],
            [[random(rows, n) for n in outs] for _ in range(2)],
            [random(n, width, scale=width**-0.5) for n in outs],
            [random(r, width, scale=r**-0.5, dtype=torch.float32).requires_grad_() for _ in outs],
            [random(n, r, scale=0.02, dtype=torch.float32).requires_grad_() for n in outs],
            dropout,
        )


def step(outputs: list[Tensor], dys: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, dys)


def frozen(case: Case, i: int) -> tuple[Tensor, ...]:
    x = case.xs[i]
    return step([F.linear(x, w) for w in case.weights], case.dys[i], [x])


def ours(case: Case, i: int, seed: Tensor | None = None) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    x, scalings = case.xs[i], [[SCALING]] * len(case.A)
    ys = fused_linear(x, case.weights, None, [[a] for a in case.A], [[b] for b in case.B], scalings, case.dropout, seed)
    return ys, step(ys, case.dys[i], [x, *case.A, *case.B])


class Plain(torch.autograd.Function):
    """What a careful composition over cuBLAS does (Unsloth's way): in-place addmm, A and B in bf16, one linear."""

    @staticmethod
    def forward(ctx, x, w, A, B, mask):
        dropped = x if mask is None else (x * mask).to(x.dtype)
        h = dropped @ A.t()
        y = x @ w.t()
        ctx.save_for_backward(dropped, w, A, B, h, mask)
        return y.addmm_(h, B.t(), alpha=SCALING)

    @staticmethod
    def backward(ctx, dy):
        dropped, w, A, B, h, mask = ctx.saved_tensors
        g = dy @ B * SCALING
        dA, dB = g.t() @ dropped, dy.t() @ h * SCALING
        dx = dy @ w
        dx = dx.addmm_(g, A) if mask is None else dx + ((g @ A) * mask).to(dx.dtype)
        return dx, None, dA, dB, None


def plain(case: Case, i: int, mask: Tensor | None = None) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    x = case.xs[i]
    if mask is None and case.dropout:
        mask = F.dropout(torch.ones_like(x), case.dropout)
    pairs = zip(case.weights, case.A, case.B, strict=True)
    ys = [Plain.apply(x, w, a.to(DTYPE), b.to(DTYPE), mask) for w, a, b in pairs]
    return ys, step(ys, case.dys[i], [x, *case.A, *case.B])


def peft_layers(case: Case, adapter_dtype: torch.dtype) -> list[torch.nn.Module]:
    from peft.tuners.lora import Linear, LoraConfig

    layers = []
    r = case.A[0].shape[0]
    for w, a, b in zip(case.weights, case.A, case.B, strict=True):
        base = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        base.weight = torch.nn.Parameter(w, requires_grad=False)
        config = LoraConfig(r=r, lora_alpha=int(SCALING * r), lora_dropout=case.dropout)
        try:
            layer = Linear(base, "d", config, r=r, lora_alpha=int(SCALING * r))
        except TypeError:
            layer = Linear(base, "d", r=r, lora_alpha=int(SCALING * r), lora_dropout=case.dropout)
        layer = layer.to(DEVICE).train()
        layer.lora_A["d"].weight = torch.nn.Parameter(a.detach().to(adapter_dtype))
        layer.lora_B["d"].weight = torch.nn.Parameter(b.detach().to(adapter_dtype))
        layers.append(layer)
    return layers


def peft(case: Case, i: int, layers: list[torch.nn.Module]) -> tuple[Tensor, ...]:
    x = case.xs[i]
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    return step([layer(x) for layer in layers], case.dys[i], [x, *parameters])


# The gate.


def exact(case: Case, mask: Tensor | None) -> list[Tensor]:
    """y, dx, dA, dB in float64, from the same fp32 masters."""
    x, dys = case.xs[0].detach().double(), [dy.double() for dy in case.dys[0]]
    dropped = x if mask is None else x * mask.double() * inverse_keep(case.dropout)
    ys, dAs, dBs = [], [], []
    dx, low = torch.zeros_like(x), torch.zeros_like(x)
    for w, a, b, dy in zip(case.weights, case.A, case.B, dys, strict=True):
        w64, a64, b64 = w.double(), a.detach().double(), b.detach().double()
        ys.append(x @ w64.t() + SCALING * (dropped @ a64.t()) @ b64.t())
        g = SCALING * dy @ b64
        dAs.append(g.t() @ dropped)
        dBs.append(SCALING * dy.t() @ (dropped @ a64.t()))
        dx += dy @ w64
        low += g @ a64
    return [*ys, dx + (low if mask is None else low * mask.double() * inverse_keep(case.dropout)), *dAs, *dBs]


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.detach().double() - truth).norm() / truth.norm())


def gate(case: Case) -> float:
    """The largest error over plain torch's; raises over 2, on NaN, and where two runs differ in a bit."""
    seed = draw_seed(torch.device(DEVICE)) if case.dropout else None
    mask = None
    if seed is not None:
        mask = keep_mask(seed, *case.xs[0].shape, case.dropout)
    truth = exact(case, mask)
    scaled = None if mask is None else mask.float() * inverse_keep(case.dropout)
    theirs = [t for group in plain(case, 0, scaled) for t in group]
    mine = [t for group in ours(case, 0, seed) for t in group]
    again = [t for group in ours(case, 0, seed) for t in group]
    ratios = [error(m, t) / error(p, t) for m, p, t in zip(mine, theirs, truth, strict=True)]
    if not all(ratio <= 2 for ratio in ratios):
        raise SystemExit(f"gate: errors over plain torch's: {ratios}")
    if not all(torch.equal(a, b) for a, b in zip(mine, again, strict=True)):
        raise SystemExit("gate: two runs differ")
    return max(ratios)


# Time.


def variants(case: Case) -> dict[str, Callable[[int], object]]:
    runs: dict[str, Callable[[int], object]] = {
        "frozen": functools.partial(frozen, case),
        "plain": functools.partial(plain, case),
        "ours": functools.partial(ours, case),
    }
    try:
        runs["peft_bf16"] = functools.partial(peft, case, layers=peft_layers(case, DTYPE))
        runs["peft_default"] = functools.partial(peft, case, layers=peft_layers(case, torch.float32))
    except ImportError:
        pass
    return runs


def passes(case: Case) -> dict[str, float]:
    """Achieved TB/s of each bandwidth-bound pass, over the bytes of its tall operand, for the first target.

    dy is counted once, also at the ranks where cuBLAS reads it a second time; x is counted once, also where a masked
    copy of it is made first, whose time is in the rate.
    """
    from lora.kernels.gradients import gradients_
    from lora.ops import launch
    from lora.ops.call import Call, Matrices
    from lora.ops.plan import ONCE

    x, dy, r, p = [t.detach() for t in case.xs], [d[0] for d in case.dys], case.A[0].shape[0], case.dropout
    a, b = case.A[0].detach().to(DTYPE), case.B[0].detach().to(DTYPE)
    h, g = (torch.randn(x[0].shape[0], r, device=DEVICE).to(DTYPE) for _ in range(2))
    dA, dB = torch.empty(a.shape, device=DEVICE), torch.empty(b.shape, device=DEVICE)
    scales = torch.full((r,), SCALING, device=DEVICE)
    seed = draw_seed(torch.device(DEVICE)) if p else None
    call = Call(Matrices(case.weights[:1], "", DTYPE), a, [b], scales, p, seed)
    steps, mask = launch.steps_of(x[0], call, dy[:1]), launch.mask_of(call)

    def dy_passes(i: int) -> None:
        if steps.dyB[0].engine == ONCE:
            return gradients_(g, dB, dy[i], h, b, scales, 1.0)
        launch.shrink_step_(steps.dyB[0].engine, g, dy[i], b.t(), scales, launch.NO_MASK)
        launch.outer_step_(steps.dB[0].engine, dB, dy[i], h)

    runs = {
        "xA": lambda i: launch.shrink_step_(steps.hidden.engine, h, x[i], a, scales, mask),
        "dyB_dB": dy_passes,
        "dA": lambda i: launch.outer_step_(steps.dA.engine, dA, g, x[i], mask),
    }
    tall = {"xA": x[0], "dyB_dB": dy[0], "dA": x[0]}
    return {name: tall[name].numel() * 2 / t / 1e6 for name, t in race(runs, calls=8, heat=0.05).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", default="lora_linear.csv")
    parser.add_argument("--rows", type=int, default=8192, help="tokens")
    parser.add_argument("--quick", action="store_true", help="r = 16 alone")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/lora_linear.py needs an NVIDIA GPU")
    torch.manual_seed(0)
    ranks = [16] if arguments.quick else arguments.ranks
    rows = []
    for (name, (width, outs)), r, dropout in itertools.product((LONE | GROUPS).items(), ranks, (0.0, 0.05)):
        case = Case.draw(arguments.rows, width, outs, r, dropout)
        row = {"case": name, "r": r, "dropout": dropout, "error_over_plain": round(gate(case), 2)}
        torch.cuda.empty_cache()
        times = race(variants(case))
        row |= {f"{k}_us": round(t, 1) for k, t in times.items()}
        row |= {f"{k}_ratio": round(t / times["frozen"], 4) for k, t in times.items() if k != "frozen"}
        row |= {f"{k}_TBs": round(rate, 2) for k, rate in passes(case).items()}
        rows.append(row)
        print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        write_csv(arguments.csv, rows)
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
