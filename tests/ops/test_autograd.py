"""What eager calls keep, when they make an input again, and how they sit between autograd, checkpoints and tracers."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora import LoraError
from lora.ops import autograd
from lora.ops.call import Call
from lora.ops.frozen_linear import frozen_linear
from lora.ops.operator import fused_linear
from lora.ops.recompute import remake


def factors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(6, 12, generator=generator).requires_grad_() for _ in range(2))
    return gate, up


def parts() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    W, A, B = (torch.randn(*shape, generator=generator) for shape in ((10, 12), (3, 12), (10, 3)))
    return W, A.requires_grad_(), B.requires_grad_()


def ours(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return fused_linear(x, [W], None, [[A]], [[B]], [[1.0]])[0]


def plain(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return x @ W.t() + (x @ A.t()) @ B.t()


def same_gradients(x: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Of `ours` and of `plain` at x, with respect to the leaves, A and B."""
    W, A, B = parts()
    got, want = (
        torch.autograd.grad(f(x, W, A, B).square().sum(), [*leaves, A, B], retain_graph=True) for f in (plain, ours)
    )
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine, exact)


def test_an_input_that_was_changed_in_place_is_saved() -> None:
    gate, up = factors()
    x = torch.nn.functional.silu(gate) * up
    assert remake(x) is not None
    with torch.no_grad():
        x.clamp_(-0.1, 0.1)
    assert remake(x) is None
    same_gradients(x, ())


def test_an_activation_that_was_checkpointed_is_not_made_again() -> None:
    gate, up = factors()
    runs = []

    def activation(gate: Tensor, up: Tensor) -> Tensor:
        runs.append(1)
        return torch.nn.functional.silu(gate) * up

    x = checkpoint(activation, gate, up, use_reentrant=False)
    y = ours(x, *parts())
    assert len(runs) == 1  # and not once more within the forward pass
    y.sum().backward()
    assert len(runs) == 2


def test_a_checkpoint_holds_no_copies_of_A_and_B(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    real = autograd.products

    def spied(x: Tensor, h: Tensor, call: Call, biases: list[Tensor]) -> list[Tensor]:
        alive.append(weakref.ref(call.B[0]))
        return real(x, h, call, biases)

    monkeypatch.setattr(autograd, "products", spied)
    gate, _ = factors()
    y = checkpoint(lambda x: ours(x, *parts()), gate, use_reentrant=False)
    assert alive[0]() is None
    y.sum().backward()


def test_a_forward_pass_under_a_dispatch_mode_and_a_backward_pass_without() -> None:
    gate, _ = factors()
    W, A, B = parts()
    with FlopCounterMode(display=False):
        y = checkpoint(lambda x: ours(x, W, A, B), gate, use_reentrant=False)
    got = torch.autograd.grad(y.sum(), [gate, A, B])
    want = torch.autograd.grad(plain(gate, W, A, B).sum(), [gate, A, B])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))


def test_torch_jit_trace() -> None:
    W, A, B = (t.detach() for t in parts())
    x = factors()[0].detach()
    traced = torch.jit.trace(lambda x: ours(x, W, A, B), (x,))
    assert torch.equal(traced(2 * x), ours(2 * x, W, A, B))


@pytest.mark.parametrize("linear_loss", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_second_derivatives_are_refused_where_they_are_taken(linear_loss: bool, quantized: bool) -> None:
    gate, _ = factors()
    W, A, B = parts()
    if quantized:
        codes = torch.full((10, 12), 3, dtype=torch.int8), torch.rand(10)
        y = frozen_linear(gate, codes, "int8:10x12", None)
    else:
        y = ours(gate, W, A, B)
    head = torch.ones(10, requires_grad=True)
    loss = (y @ head).sum() if linear_loss else (y @ head).square().sum()
    through_head, through_ours = torch.autograd.grad(loss, [head, gate], create_graph=True)
    assert through_ours.isfinite().all()
    with pytest.raises(LoraError, match="second derivatives .create_graph=True. do not pass"):
        through_ours.square().sum().backward(retain_graph=True)
    if linear_loss:
        through_head.square().sum().backward()  # which differentiates y, once
        assert gate.grad is not None


def test_two_backward_passes_and_gradients_of_a_part() -> None:
    gate, up = factors()
    W, A, B = parts()
    y = ours(gate * up, W, A, B).square().sum()
    first = torch.autograd.grad(y, [gate, A], retain_graph=True)
    again = torch.autograd.grad(y, [gate, A, B])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=False))
    same_gradients(gate * up, (gate, up))


def test_a_call_in_inference_mode_does_not_spoil_the_next() -> None:
    W = torch.full((10, 12), 3, dtype=torch.int8), torch.rand(10)
    gate, _ = factors()

    def frozen(x: Tensor) -> Tensor:
        return frozen_linear(x, W, "int8:10x12", None)

    with torch.inference_mode():
        frozen(gate)
    frozen(gate).sum().backward()
    assert gate.grad is not None


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_of_torch_func_are_refused(transform: str) -> None:
    gate, _ = factors()
    W, A, B = parts()

    def total(x: Tensor) -> Tensor:
        return ours(x, W, A, B).sum()

    gate = gate.detach()
    with pytest.raises(LoraError, match="torch.func's transforms"):
        if transform == "grad":
            torch.func.grad(total)(gate)
        elif transform == "jvp":
            torch.func.jvp(total, (gate,), (gate,))
        else:
            torch.func.vmap(total)(gate[None])
