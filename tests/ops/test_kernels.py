"""The Triton kernels against float64, through Triton's interpreter: small odd shapes, outputs poisoned with NaN.

The interpreter must be switched on before triton is imported, so these tests run this file in a process of its own.
"""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(63, 341), (5, 256)]
RANKS = [1, 7, 16, 24, 64, 200]
DTYPES = [torch.float32, torch.float16]  # the interpreter's bf16 products are wrong

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that test_through_the_interpreter starts"
)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def close(value: Tensor, truth: Tensor) -> bool:
    """Within rounding to value's dtype, by norm; NaN is never close."""
    bound = {torch.float32: 1e-6, torch.float16: 5e-4}[value.dtype]
    return bool((value.double() - truth).norm() <= bound * truth.norm() + 1e-30)


def dropout(p: float, rows: int, columns: int) -> tuple[Tensor | None, int, float, Tensor]:
    """(seed, threshold, inverse keep, the mask as float64)"""
    from lora.ops.philox import inverse_keep, keep_mask, threshold

    if not p:
        return None, 0, 1.0, torch.ones(rows, columns, dtype=torch.float64)
    seed = torch.tensor([2**61 + 987654321])
    return seed, threshold(p), inverse_keep(p), keep_mask(seed, rows, columns, p).double()


CASES = [
    case
    for i, case in enumerate(itertools.product(SHAPES, RANKS, DTYPES, (0.0, 0.3)))
    if (case[0] == SHAPES[0] or i % 5 == 0) and case[1:3] != (200, torch.float32)
]


@needs_interpreter
@pytest.mark.parametrize(("shape", "rank", "dtype", "p"), CASES)
def test_shrink_and_outer(shape: tuple[int, int], rank: int, dtype: torch.dtype, p: float) -> None:
    from lora.kernels.outer import outer_
    from lora.kernels.shrink import shrink_

    rows, columns = shape
    seed, limit, scale, mask = dropout(p, rows, columns)
    x, w, g, scales = (
        random(rows, columns, dtype=dtype),
        random(rank, columns, dtype=dtype),
        random(rows, rank),
        random(rank),
    )
    dropped, g = x.double() * mask, g.to(dtype)
    truth = dropped @ w.double().t() * scales.double() * scale
    out = poisoned(rows, -(-rank // 8) * 8, dtype=dtype)[:, :rank]
    assert close(shrink_(out, x, w, scales, seed, limit, scale), truth)
    tall = w.t().contiguous().t()  # stored (K, R)
    config = {"BM": 32, "BR": 16, "SPLITS": 3, "warps": 4, "stages": 2}
    assert close(shrink_(out.fill_(float("nan")), x, tall, scales, seed, limit, scale, config), truth)
    truth = g.double().t() @ dropped
    assert close(outer_(poisoned(rank, columns), g, x, seed, limit), truth)
    config = {"BN": 32, "BR": 16, "SPLITS": 2, "warps": 4, "stages": 2}
    assert close(outer_(poisoned(rank, columns), g, x, seed, limit, config), truth)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 7, 16, 24, 32])
@pytest.mark.parametrize("shape", [(63, 341), (130, 1030), (5, 256), (1, 1)])
def test_gradients(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    from lora.kernels.gradients import gradients_

    rows, columns = shape
    dy, h, b = (random(*s).to(dtype) for s in ((rows, columns + 9), (rows, rank + 8), (columns, rank + 8)))
    dy, h, b, scales = dy[:, 7:-2], h[:, 8:], b[:, 8:], random(rank)
    g_truth = dy.double() @ b.double() * scales.double() * 1.25
    dB_truth = dy.double().t() @ h.double()
    small = {"BM": 16, "BC": 128, "BR": max(16, 1 << (rank - 1).bit_length()), "programs": 40, "warps": 4, "stages": 2}
    for config in (None, small):  # small: up to nine blocks of columns and four slabs of rows
        g, dB = poisoned(rows, rank + 5, dtype=dtype), poisoned(columns, rank)
        gradients_(g[:, 3 : rank + 3], dB, dy, h, b, scales, 1.25, config)
        assert close(g[:, 3 : rank + 3], g_truth)
        assert close(dB, dB_truth)
        assert g[:, :3].isnan().all()
        assert g[:, rank + 3 :].isnan().all()


@needs_interpreter
def test_gradients_of_many_blocks_and_slabs() -> None:
    """More than the sixteen partial sums that the second stage takes at a time: 21 blocks of columns, 19 slabs."""
    from lora.kernels.gradients import gradients_

    dy, h, b, scales = random(300, 2570), random(300, 17), random(2570, 17), random(17)
    config = {"BM": 16, "BC": 128, "BR": 32, "programs": 400, "warps": 4, "stages": 2}
    g, dB = poisoned(300, 17), poisoned(2570, 17)
    gradients_(g, dB, dy, h, b, scales, 1.25, config)
    assert close(g, dy.double() @ b.double() * scales.double() * 1.25)
    assert close(dB, dy.double().t() @ h.double())
    gradients_(g[:0], dB, dy[:0], h[:0], b, scales, 1.25)
    assert not dB.any()


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [8, 72, 136])
def test_gemm(rank: int, dtype: torch.dtype) -> None:
    from lora.kernels.gemm import gemm_

    rows, depth, width = 63, 72, 304
    x, w, h, b = random(rows, depth), random(depth, width), random(rows, rank), random(rank, width)
    x, w, h, b = (t.to(dtype) for t in (x, w, h, b))
    truth = x.double() @ w.double() + h.double() @ b.double()
    config = {"BM": 64, "BN": 256, "BK": 64, "GROUP_M": 8, "warps": 8, "stages": 3}
    assert close(gemm_(poisoned(rows, width, dtype=dtype), x, w, h, b, config), truth)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [True, False])
def test_product(silu: bool, dtype: torch.dtype) -> None:
    from lora.kernels.copies import product

    left, right = random(63, 341).to(dtype), random(341, 63).to(dtype).view(63, 341)
    truth = (torch.nn.functional.silu(left.double()) if silu else left.double()) * right.double()
    assert close(product(left, right, silu), truth)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(63, 341), (130, 1030), (5, 256), (1, 1), (0, 341)])
def test_scale(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from lora.kernels.scale import scale_, scale_backward_

    rows, columns = shape
    z, dy = (random(rows + i, columns + 9).to(dtype)[i:, 7:-2] for i in (0, 1))
    c, bias = random(columns), random(columns, 1).to(dtype).view(-1)
    assert close(scale_(poisoned(rows, columns, dtype=dtype), z, c, bias), z.double() * c.double() + bias.double())
    assert torch.equal(scale_(poisoned(rows, columns, dtype=dtype), z, c, None), (z.float() * c).to(dtype))
    assert torch.equal(scale_(poisoned(rows, columns, dtype=dtype), z, torch.ones(columns), None), z)
    for programs in (0, 1, 40):
        dz, dc = poisoned(rows, columns, dtype=dtype), poisoned(columns)
        scale_backward_(dz, dc, dy, z, c, programs)
        assert torch.equal(dz, (dy.float() * c).to(dtype))
        assert close(dc, (dy.double() * z.double()).sum(0))


@needs_interpreter
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_scale_on_the_card_is_the_plain_one(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    from lora.ops import scale

    monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext())
    z, dy = random(3, 21, 341).half().requires_grad_(), random(341, 3, 21).half().permute(1, 2, 0)
    c, b = random(341).requires_grad_(), random(341, 1).half().view(-1).requires_grad_() if bias else None
    leaves = [t for t in (z, c, b) if t is not None]

    def results(with_kernels: bool) -> list[Tensor]:
        monkeypatch.setattr(scale, "_in_kernels", lambda z: with_kernels)
        y = scale.scale_output(z, c, b)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    for mine, plain in zip(results(True), results(False), strict=True):
        assert mine.shape == plain.shape and close(mine, plain.double())


@needs_interpreter
def test_gemm_reads_a_slice_of_h() -> None:
    from lora.kernels.gemm import can_describe, gemm_

    x, w, h, b = random(40, 64), random(64, 48), random(40, 32)[:, 8:24], random(16, 48)
    assert can_describe(x, w, h, b)
    assert not can_describe(random(40, 63))
    assert not can_describe(random(64, 40).t())
    y = gemm_(poisoned(40, 48), x, w, h, b)
    assert close(y, x.double() @ w.double() + h.double() @ b.double())


@needs_interpreter
@pytest.mark.parametrize("p", [0.05, 0.3, 0.996])
def test_mask_is_the_references(p: float) -> None:
    from lora.kernels.expand import expand_

    seed, limit, _, mask = dropout(p, 63, 341)
    drawn = expand_(poisoned(63, 341), torch.ones(63, 1), torch.ones(1, 341), seed, limit)
    assert torch.equal(drawn.double(), mask)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(63, 341), (5, 256), (1, 1), (0, 341)])
def test_dropped(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A masked copy has the bits of x where the mask keeps them, and zeros elsewhere."""
    from lora.kernels.copies import dropped

    rows, columns = shape
    seed, limit, _, mask = dropout(0.3, rows, columns)
    assert seed is not None
    x = random(rows + 1, columns + 9).to(dtype)[:rows, 7:-2]
    x[:, ::7] = float("inf")  # which a product with the mask would turn into NaN
    assert torch.equal(dropped(x, seed, limit), torch.where(mask.bool(), x, 0))


@needs_interpreter
@pytest.mark.parametrize("rank", [1, 24, 200])
def test_expand(rank: int) -> None:
    from lora.kernels.expand import expand_

    seed, limit, _, mask = dropout(0.3, 63, 341)
    g, a = random(63, rank), random(rank, 341)
    assert close(expand_(poisoned(63, 341), g, a, seed, limit), mask * (g.double() @ a.double()))


@needs_interpreter
def test_rows_of_any_stride_and_no_rows() -> None:
    from lora.kernels.outer import outer_
    from lora.kernels.shrink import shrink_

    x, w, g, scales = random(33, 700)[:, 100:441], random(8, 341), random(33, 16)[:, 8:], torch.ones(8)
    truth = x.double() @ w.double().t()
    assert close(shrink_(poisoned(33, 8), x, w, scales, None, 0, 1.0), truth)
    assert close(outer_(poisoned(8, 341), g, x), g.double().t() @ x.double())
    shrink_(torch.empty(0, 8), x[:0], w, scales, None, 0, 1.0)
    assert not outer_(poisoned(8, 341), g[:0], x[:0]).any()


class _Stream:
    """In the place of a CUDA stream: the interpreter runs everything in order."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return f"{self.name}'s event"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, stream: "_Stream") -> None:
        self.log.append(f"{self.name} waits for {stream.name}")


@needs_interpreter
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("product_of_two", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("major", "ranks"), [(9, (8, 5)), (9, (8, 40)), (9, (40, 40)), (8, (8, 5))])
def test_the_path_of_the_card_is_the_plain_one(
    major: int, ranks: tuple[int, int], p: float, product_of_two: bool, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All launches of a forward and a backward pass, with the rules and the streams of a card pretended.

    A Hopper card reads dy once at ranks up to 32; at others and on other cards dB is a product of cuBLAS's, as dA is
    where a group has more than 32 ranks, or under dropout more than 64, for which x is masked once.
    """
    import contextlib

    from lora.kernels.tuning import Card
    from lora.ops import dispatch, launch, plan
    from lora.ops.operator import fused_linear

    for name, value in (
        ("current_stream", lambda device=None: main),
        ("stream", lambda s: contextlib.nullcontext()),
        ("device_of", lambda t: contextlib.nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    log: list[str] = []
    main, side = _Stream("main", log), _Stream("side", log)
    monkeypatch.setattr(launch, "_side_stream", lambda device: side)
    monkeypatch.setattr(plan, "SMALL", 4)
    monkeypatch.setattr(launch, "plan", plan.plan.__wrapped__)  # what is kept by shape knows another SMALL
    monkeypatch.setattr(launch, "card", lambda device: Card(major, 0, 0))
    mm = torch.mm

    def cublas(left: Tensor, right: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        if out_dtype is None:
            return mm(left, right, out=out)
        log.append("product")
        return out.copy_(mm(left.to(out_dtype), right.to(out_dtype)))  # a CPU has no out_dtype

    monkeypatch.setattr(torch, "mm", cublas)
    left, right = (random(40, 256 + i)[:, :256].contiguous().half().requires_grad_() for i in range(2))
    weights = [(random(n, 256) / 16).half() for n in (64, 256)]
    formats = ""
    if quantized:
        scales = [w.float().abs().amax(1) for w in weights]
        codes = [(w / s[:, None] * 127).round().to(torch.int8) for w, s in zip(weights, scales, strict=True)]
        weights = [t for pair in zip(codes, scales, strict=True) for t in pair]
        formats = "int8:64x256;int8:256x256"
    A = [[(random(r, 256) / 16).requires_grad_()] for r in ranks]
    B = [[random(n, r).requires_grad_()] for n, r in zip((64, 256), ranks, strict=True)]
    seed = torch.tensor([123]) if p else None
    leaves = [left, *([right] if product_of_two else []), *(t for group in (*A, *B) for t in group)]

    def results(with_kernels: bool) -> list[Tensor]:
        monkeypatch.setattr(dispatch, "in_kernels", lambda x: with_kernels)
        x = left * right if product_of_two else left * 1.0
        ys = fused_linear(x, weights, None, A, B, [[2.0], [1.0]], p, seed, formats)
        dys = [random(*y.shape).half() for y in ys]
        dys[0] = dys[0].t().contiguous().t()  # as from a transposed view: the kernels read rows
        return [*ys, *torch.autograd.grad(ys, leaves, dys)]

    for mine, plain in zip(results(True), results(False), strict=True):
        assert (mine.double() - plain.double()).norm() <= 2e-3 * plain.double().norm()
    products = sum(major != 9 or r > 32 for r in ranks) + (sum(ranks) > (64 if p else 32))
    assert log == ["main records", "side waits for main's event", *["product"] * products, "main waits for side"]
