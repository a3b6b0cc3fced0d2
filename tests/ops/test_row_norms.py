"""The norms of W0 + s B A by row against the dense matrix's in float64."""

import pytest
import torch
from torch import Tensor

from lora.ops import row_norms as module
from lora.ops.row_norms import row_norms

Pairs = list[tuple[Tensor, Tensor, float]]


def problem(
    out: int, width: int, ranks: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Pairs]:
    generator = torch.Generator().manual_seed(out + width + sum(ranks))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(device)

    W = (draw(out, width) * 0.02).to(dtype)
    return W, [(draw(r, width) / width**0.5, draw(out, r) * 0.05, 0.5 + i) for i, r in enumerate(ranks)]


def dense(W: Tensor, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """Of the matrix itself, made in `dtype`."""
    total = W.to(dtype)
    for A, B, s in pairs:
        total = total + (B.to(dtype) @ A.to(dtype)) * s
    return torch.linalg.vector_norm(total, dim=1)


SHAPES = [(63, 341, (7,)), (128, 64, (16, 3)), (33, 96, (64, 64, 1)), (5, 8, ())]


@pytest.mark.parametrize("block", [2**20, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_within_twice_plain_torchs(
    shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    W, pairs = problem(*shape, dtype)
    exact = dense(W, pairs, torch.float64)
    got = row_norms(W, pairs)
    assert got.dtype == torch.float32
    plain = dense(W, pairs, dtype).double()
    assert (got - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.norm()
    assert (got - exact).norm() <= 1e-6 * exact.norm()  # W0 is widened before any product here
    torch.testing.assert_close(row_norms(W, pairs, torch.float64), exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_zero_update_leaves_the_norm(dtype: torch.dtype) -> None:
    W, pairs = problem(63, 341, (7, 4), dtype)
    got = row_norms(W, [(A, torch.zeros_like(B), s) for A, B, s in pairs])
    torch.testing.assert_close(got, dense(W, [], torch.float64).float(), rtol=3e-7, atol=0)


def test_an_update_that_takes_the_weight_away_leaves_a_number() -> None:
    torch.manual_seed(0)  # how much is left is rounding, and differs from draw to draw
    A, B = torch.randn(4, 40), torch.randn(30, 4)
    got = row_norms(-(B @ A), [(A, B, 1.0)])
    assert got.isfinite().all() and (got <= 1e-2).all()


def test_has_no_gradient_and_heeds_no_autocast() -> None:
    W, pairs = problem(63, 341, (7,), torch.float32)
    pairs = [(A.requires_grad_(), B.requires_grad_(), s) for A, B, s in pairs]
    with torch.autocast("cpu", torch.bfloat16):
        got = row_norms(W.requires_grad_(), pairs)
    assert not got.requires_grad
    assert torch.equal(got, row_norms(W, pairs))


def test_compiles_and_reads_a_transposed_weight() -> None:
    W, pairs = problem(63, 341, (7,), torch.bfloat16)
    want = row_norms(W, pairs)
    torch.testing.assert_close(row_norms(W.t().contiguous().t(), pairs), want)
    compiled = torch.compile(row_norms, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(W, pairs), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 4096, (16,))], ids=str)
def test_on_the_card(shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype) -> None:
    W, pairs = problem(*shape, dtype, "cuda")
    exact, plain = dense(W, pairs, torch.float64), dense(W, pairs, dtype).double()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = row_norms(W, pairs)
    if W.numel() > 2**22 and dtype != torch.float32:
        assert torch.cuda.max_memory_allocated() - before < W.numel()  # bytes: no copy of W0
    assert (got - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.norm()
