"""The reference formula against float64, in each dtype, held to the error of the plainest torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.ops import lora_linear, low_rank_product

SHAPES = [(5, 63, 341, 7), (64, 16, 16, 1), (33, 128, 64, 16), (0, 8, 9, 3)]


def draw(n: int, inputs: int, outputs: int, r: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n + inputs + outputs + r)
    x, w, b = (torch.randn(*s, generator=g).to(dtype) for s in ((n, inputs), (outputs, inputs), (outputs,)))
    A, B = torch.randn(r, inputs, generator=g) / inputs**0.5, torch.randn(outputs, r, generator=g)
    return x, w, b, A, B


def plain(x: Tensor, w: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    return F.linear(x, w, b) + s * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def run(function, tensors: tuple[Tensor, ...], s: float, grad: Tensor) -> list[Tensor]:
    x, w, b, A, B = (t.detach().clone().requires_grad_() for t in tensors)
    y = function(x, w, b, A, B, s)
    y.backward(grad.to(y.dtype))
    return [y.detach(), x.grad, w.grad, b.grad, A.grad, B.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_within_twice_plain_torchs_error(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = draw(*shape, dtype)  # type: ignore[arg-type]
    grad = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(9)).to(dtype)
    exact = run(plain, tuple(t.double() for t in tensors), 0.7, grad)
    theirs = run(plain, tensors, 0.7, grad)
    ours = run(lambda x, w, b, A, B, s: lora_linear(x, w, b, [(A, B, s, 0.0)]), tensors, 0.7, grad)
    for name, right, plain_one, our_one in zip(["y", "dx", "dw", "db", "dA", "dB"], exact, theirs, ours, strict=True):
        assert our_one.shape == right.shape
        allowed = 2 * (plain_one.double() - right).norm()
        assert (our_one.double() - right).norm() <= allowed, name


def test_gradcheck() -> None:
    x, w, b, A, B = (t.double().requires_grad_() for t in draw(3, 5, 4, 2, torch.float64))
    assert torch.autograd.gradcheck(lambda *t: lora_linear(t[0], t[1], t[2], [(t[3], t[4], 0.5, 0.0)]), (x, w, b, A, B))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=0, max_size=3), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_leading_dimensions_and_strides_do_not_matter(lead: list[int], inputs: int, outputs: int, flip: bool) -> None:
    x, w, b, A, B = draw(1, inputs, outputs, 2, torch.float64)
    A, B = A.double(), B.double()
    x = torch.randn(*lead, inputs, dtype=torch.float64)
    if flip and len(lead) >= 2:
        x = x.transpose(0, 1)
    got = lora_linear(x, w, b, [(A, B, 0.3, 0.0)])
    assert got.shape == (*x.shape[:-1], outputs)
    torch.testing.assert_close(got, plain(x, w, b, A, B, 0.3), rtol=1e-12, atol=1e-12)


def test_several_updates_add() -> None:
    x, w, b, A, B = draw(7, 12, 9, 3, torch.float64)
    updates = [(A * i, B, 0.1 * i, 0.0) for i in (1, 2, 3)]
    delta = sum(s * x @ (A_.T.double()) @ B_.T.double() for A_, B_, s, _ in updates)
    torch.testing.assert_close(lora_linear(x, w, b, updates), x @ w.T + b + delta, rtol=1e-12, atol=1e-12)


def test_dropout_drops_the_updates_input_only() -> None:
    x, w, b, A, B = draw(64, 32, 16, 4, torch.float32)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.4)
    torch.manual_seed(0)
    got = lora_linear(x, w, b, [(A, B, 1.5, 0.4)])
    want = F.linear(x.double(), w.double(), b.double()) + 1.5 * dropped.double() @ A.T.double() @ B.T.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_b_changes_no_bit(dtype: torch.dtype) -> None:
    x, w, b, A, B = draw(33, 128, 64, 16, dtype)
    assert torch.equal(lora_linear(x[None], w, b, [(A, torch.zeros_like(B), 2.0, 0.0)]), F.linear(x[None], w, b))
    assert torch.equal(lora_linear(x[None], w, None, [(A, torch.zeros_like(B), 2.0, 0.0)]), F.linear(x[None], w))


def test_no_fp32_copy_of_the_input_is_saved() -> None:
    x, w, _, A, B = draw(64, 128, 32, 4, torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        lora_linear(x, w, None, [(A.requires_grad_(), B.requires_grad_(), 1.0, 0.0)])
    big = [t for t in saved if t.numel() >= x.numel() and t.dtype == torch.float32]
    assert saved
    assert not big


def test_low_rank_product_is_the_float64_sum_rounded_once() -> None:
    updates = [(torch.randn(5, 40), torch.randn(30, 5), s) for s in (0.5, 3.0)]
    exact = sum(s * B.double() @ A.double() for A, B, s in updates)
    got = low_rank_product(updates, slice(4, 20), torch.float32)
    assert torch.equal(got, exact[4:20].float())
