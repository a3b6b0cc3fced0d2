"""The plan as a table of cases, and that a pass launches what its plan says and nothing else."""

import contextlib
import importlib.util
import itertools

import pytest
import torch
from torch import Tensor

from lora.ops.operator import fused_linear
from lora.ops.philox import keep_mask
from lora.ops.plan import COPY, CUBLAS, ONCE, SMALL, TRITON, Shape, Step, Steps, describe, plan

P = 0.3


def shape(
    *ranks: int, rows: int = 8192, width: int = 4096, outs: tuple[int, ...] = (4096,), dropout: bool = False,
    major: int = 9, **other: object,
) -> Shape:  # fmt: skip
    """q_proj of Llama-3.1-8B on an H100, but for what a case says; one target for each rank."""
    targets = tuple(zip(outs * len(ranks) if len(outs) == 1 else outs, ranks, strict=True))
    return Shape(rows, width, targets, dropout, **{"element_size": 2, "major": major, "processors": 132, **other})  # type: ignore[arg-type]


OVER_32 = "by cuBLAS (over 32 ranks)"
CASES = [
    # x A^T, dy B and dB by target, dA, dX, two streams, in words
    (shape(16), "triton", ["one read"], ["one read"], "triton", "triton", True, "fused"),
    (shape(32), "triton", ["one read"], ["one read"], "triton", "triton", True, "fused"),
    (shape(33), "triton", ["triton"], ["cublas"], "cublas", "triton", True, f"fused, dA and dB {OVER_32}"),
    (shape(64), "triton", ["triton"], ["cublas"], "cublas", "triton", True, f"fused, dA and dB {OVER_32}"),
    (
        shape(65), "cublas", ["cublas"], ["cublas"], "cublas", "triton", True,
        "fused, xA and dyB by cuBLAS (over 64 ranks), dA and dB by cuBLAS (over 32 ranks)",
    ),
    # The ranks of a group count together for x A^T and dA, and by target for dy B and dB.
    (
        shape(16, 16, 16, outs=(4096, 1024, 1024)), "triton", ["one read"] * 3, ["one read"] * 3, "cublas", "triton",
        True, "fused, dA by cuBLAS (over 32 ranks)",
    ),
    (
        shape(40, 32), "cublas", ["triton", "one read"], ["cublas", "one read"], "cublas", "triton", True,
        "fused, xA by cuBLAS (over 64 ranks), dA and dB by cuBLAS (over 32 ranks)",
    ),
    # Other cards.
    (
        shape(16, major=8), "triton", ["triton"], ["cublas"], "triton", "cublas", True,
        "fused, dX and dB by cuBLAS (no Hopper GPU)",
    ),
    (
        shape(16, major=10), "triton", ["triton"], ["cublas"], "triton", "cublas", True,
        "fused, dX and dB by cuBLAS (no Hopper GPU)",
    ),
    (
        shape(40, major=8), "triton", ["triton"], ["cublas"], "cublas", "cublas", True,
        "fused, dX and dB by cuBLAS (no Hopper GPU), dA by cuBLAS (over 32 ranks)",
    ),
    (
        shape(16, major=7), "cublas", ["cublas"], ["cublas"], "cublas", "cublas", False,
        "fused, all by cuBLAS (GPU older than Ampere)",
    ),
    (
        shape(16, triton=False), "cublas", ["cublas"], ["cublas"], "cublas", "cublas", False,
        "fused, all by cuBLAS (triton is not installed)",
    ),
    (
        shape(16, element_size=4), "cublas", ["cublas"], ["cublas"], "cublas", "cublas", False,
        "fused, all by cuBLAS (no 16-bit compute)",
    ),
    # Dropout.
    (
        shape(16, dropout=True), "triton", ["one read"], ["one read"], "triton", "cublas", True,
        "fused, dX by cuBLAS (dropout)",
    ),
    (
        shape(64, dropout=True), "triton", ["triton"], ["cublas"], "triton", "cublas", True,
        "fused, dX by cuBLAS (dropout), dB by cuBLAS (over 32 ranks)",
    ),
    (
        shape(65, dropout=True), "masked copy", ["cublas"], ["cublas"], "masked copy", "cublas", True,
        "fused, xA, dyB and dA by cuBLAS (over 64 ranks), dX by cuBLAS (dropout), dB by cuBLAS (over 32 ranks)",
    ),
    (
        shape(16, rows=SMALL - 1, dropout=True), "triton", ["cublas"], ["cublas"], "triton", "cublas", False,
        "fused, dyB and dB by cuBLAS (few rows), dX by cuBLAS (dropout)",
    ),
    # Sizes.
    (
        shape(16, rows=500), "cublas", ["cublas"], ["cublas"], "cublas", "cublas", False,
        "fused, all by cuBLAS (few rows)",
    ),
    (
        shape(16, rows=SMALL - 1), "cublas", ["cublas"], ["cublas"], "cublas", "triton", False,
        "fused, xA, dyB, dA and dB by cuBLAS (few rows)",
    ),
    (shape(16, rows=SMALL), "triton", ["one read"], ["one read"], "triton", "triton", True, "fused"),
    (
        shape(16, rows=SMALL, outs=(512,)), "triton", ["one read"], ["one read"], "triton", "cublas", True,
        "fused, dX by cuBLAS (few rows)",
    ),
    (
        shape(16, width=255), "triton", ["one read"], ["one read"], "triton", "cublas", True,
        "fused, dX by cuBLAS (too narrow)",
    ),
    (
        shape(16, outs=(16385,)), "triton", ["triton"], ["cublas"], "triton", "triton", True,
        "fused, dB by cuBLAS (dY over 134,217,728 elements)",
    ),
    (
        shape(40, outs=(32,)), "triton", ["triton"], ["triton"], "cublas", "cublas", True,
        "fused, dX by cuBLAS (too narrow), dA by cuBLAS (over 32 ranks)",
    ),
    (
        shape(16, aligned=False), "triton", ["one read"], ["one read"], "triton", "cublas", True,
        "fused, dX by cuBLAS (strides that TMA cannot read)",
    ),
    (
        shape(16, rows=0), "cublas", ["cublas"], ["triton"], "triton", "cublas", False,
        "fused, xA, dyB and dX by cuBLAS (few rows)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "hidden", "dyB", "dB", "dA", "dx", "two_streams", "words"), CASES)
def test_plan(
    given: Shape, hidden: str, dyB: list[str], dB: list[str], dA: str, dx: str, two_streams: bool, words: str
) -> None:
    steps = plan(given)
    assert steps.hidden.engine == hidden
    assert [step.engine for step in steps.dyB] == dyB
    assert [step.engine for step in steps.dB] == dB
    assert (steps.dA.engine, steps.dx.engine, steps.two_streams) == (dA, dx, two_streams)
    assert describe(steps) == words


def test_every_plan_says_why_a_product_is_not_in_our_kernels_and_masks_each_input_once() -> None:
    numbers = itertools.product((0, 1, 300, 2048, 8192), (64, 4096, 20000), (1, 33, 65), (False, True), (7, 8, 9, 12))
    for rows, out, rank, dropout, major in numbers:
        steps = plan(shape(rank, rank, rows=rows, outs=(out, 64), dropout=dropout, major=major))
        for step in (steps.hidden, *steps.dyB, *steps.dB, steps.dA, steps.dx):
            assert bool(step.why) == (step.engine in (CUBLAS, COPY))
        for step in (steps.hidden, steps.dA):  # what reads x
            assert major < 8 or (step.engine in (TRITON, COPY) if dropout else step.engine in (TRITON, CUBLAS))
        assert all((a.engine == ONCE) == (b.engine == ONCE) for a, b in zip(steps.dyB, steps.dB, strict=True))


OF_X = {False: (TRITON, CUBLAS), True: (TRITON, COPY)}  # by whether there is a mask
OF_DY = ((ONCE, ONCE), (TRITON, CUBLAS), (CUBLAS, TRITON), (CUBLAS, CUBLAS))
PLANS = [
    (
        masked,
        Steps(Step(hidden), (Step(first[0]), Step(TRITON)), (Step(first[1]), Step(CUBLAS)), Step(dA), Step(dx), two),
    )
    for masked, first, two in itertools.product((False, True), OF_DY, (False, True))
    for hidden, dA in itertools.product(OF_X[masked], OF_X[masked])
    for dx in ((CUBLAS,) if masked else (TRITON, CUBLAS))
]


def said(steps: Steps, masked: bool) -> list[str]:
    """The launches of such a plan, in order."""
    main = {ONCE: ["gradients"], TRITON: ["shrink"], CUBLAS: []}
    side = {ONCE: [], TRITON: ["outer"], CUBLAS: ["mm"], COPY: ["dropped", "mm"]}
    log = {TRITON: ["shrink"], CUBLAS: [], COPY: ["dropped"]}[steps.hidden.engine] + [
        name for step in steps.dyB for name in main[step.engine]
    ]
    log += ["record"] * steps.two_streams
    log += ["expand"] if masked else ["gemm"] if steps.dx.engine == TRITON else []
    log += ["wait"] * steps.two_streams
    log += [name for step in (steps.dA, *steps.dB) for name in side[step.engine]]
    return log + ["join"] * steps.two_streams


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("masked", "steps"), PLANS)
def test_a_pass_launches_what_its_plan_says(masked: bool, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes are: any other choice, made anywhere, would show in what was launched."""
    from lora.kernels.tuning import Card
    from lora.ops import dispatch, launch

    log: list[str] = []
    seed = torch.tensor([123]) if masked else None

    def mask(x: Tensor, given: Tensor | None) -> Tensor:
        return x if given is None else x * keep_mask(given, *x.shape, P)

    def shrink_(out, x, w, scales, given, limit, inv_keep):  # type: ignore[no-untyped-def]
        log.append("shrink")
        out.copy_((mask(x, given) @ w.t()) * scales * inv_keep)

    def gradients_(g, dB, dy, h, b, scales, inv_keep):  # type: ignore[no-untyped-def]
        log.append("gradients")
        g.copy_((dy @ b) * scales * inv_keep)
        dB.copy_(dy.t() @ h)

    def outer_(out, p, x, given, limit):  # type: ignore[no-untyped-def]
        log.append("outer")
        out.copy_(p.t() @ mask(x, given))

    def gemm_(y, x, w, h, b):  # type: ignore[no-untyped-def]
        log.append("gemm")
        y.copy_(x @ w + h @ b)

    def expand_(out, g, a, given, limit):  # type: ignore[no-untyped-def]
        log.append("expand")
        out.copy_(mask(g @ a, given))

    def dropped(x, given, limit):  # type: ignore[no-untyped-def]
        log.append("dropped")
        return mask(x, given)

    def mm(left, right, *, out, out_dtype=None):  # type: ignore[no-untyped-def]
        log.extend(["mm"] * (out_dtype is not None))
        return out.copy_(left @ right)

    class Stream:
        def record_event(self) -> str:
            log.append("record")
            return "event"

        def wait_event(self, event: str) -> None:
            log.append("wait")

        def wait_stream(self, stream: "Stream") -> None:
            log.append("join")

    for fake in (shrink_, gradients_, outer_, gemm_, expand_, dropped):
        monkeypatch.setattr(launch, fake.__name__, fake)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(launch, "_side_stream", lambda device: Stream())
    monkeypatch.setattr(launch, "card", lambda device: Card(9, 132, 0))
    asked: list[Shape] = []
    monkeypatch.setattr(launch, "plan", lambda shape: asked.append(shape) or steps)

    generator = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(*s, generator=generator) for s in ((6, 16), (12, 16), (24, 16)))
    A = [[torch.randn(r, 16, generator=generator).requires_grad_()] for r in (8, 2)]
    B = [[torch.randn(n, r, generator=generator).requires_grad_()] for n, r in ((12, 8), (24, 2))]

    def results(with_kernels: bool) -> list[Tensor]:
        monkeypatch.setattr(dispatch, "in_kernels", lambda x: with_kernels)
        leaf = x.clone().requires_grad_()
        ys = fused_linear(leaf, weights, None, A, B, [[2.0], [0.5]], P if masked else 0.0, seed)
        return [*ys, *torch.autograd.grad(ys, [leaf, A[0][0], A[1][0], B[0][0], B[1][0]], [y.sin() for y in ys])]

    for mine, plain in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    assert log == said(steps, masked)
    both = Shape(6, 16, ((12, 8), (24, 2)), masked, 4, 9, 132)
    assert asked == [both, both]
