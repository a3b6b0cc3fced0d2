"""What eager calls keep, when they make an input again, and how they sit between autograd, checkpoints and tracers."""

import ast
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora import LoraError
from lora.ops import autograd, reference
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
    real = reference.products

    def spied(x: Tensor, h: Tensor, call: Call, biases: list[Tensor]) -> list[Tensor]:
        alive.append(weakref.ref(call.B[0]))
        return real(x, h, call, biases)

    monkeypatch.setattr(reference, "products", spied)
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


def two() -> tuple[Tensor, list[Tensor], list[list[Tensor]], list[list[Tensor]], list[Tensor]]:
    """x, weights, A, B and biases of two targets."""
    generator = torch.Generator().manual_seed(2)
    x, *weights = (torch.randn(*shape, generator=generator) for shape in ((6, 12), (10, 12), (7, 12)))
    A = [[torch.randn(3, 12, generator=generator).requires_grad_()] for _ in weights]
    B = [[torch.randn(w.shape[0], 3, generator=generator).requires_grad_()] for w in weights]
    return x.requires_grad_(), weights, A, B, [torch.zeros(w.shape[0], requires_grad=True) for w in weights]


def test_outputs_one_after_the_other_and_together() -> None:
    """Each pass hands over its own dys, and keeps nothing of another's."""
    x, weights, A, B, biases = two()
    leaves = [x, A[0][0], A[1][0], B[0][0], B[1][0], *biases]
    first, second = fused_linear(x, weights, biases, A, B, [[1.0], [0.5]])

    def found(*ys: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad([y.sin().sum() for y in ys], leaves, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]

    one, other, both = found(first), found(second), found(first, second)
    assert not one[2].any() and not other[1].any()
    for a, b, whole in zip(one, other, both, strict=True):
        torch.testing.assert_close(a + b, whole, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found(first), one, strict=True))


def test_gradients_of_the_biases_alone_compute_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, A, B, biases = two()
    ys = fused_linear(x, weights, biases, A, B, [[1.0], [0.5]])
    monkeypatch.setattr(reference, "backward", None)
    found = torch.autograd.grad([y.sum() for y in ys], biases)
    assert all(torch.equal(g, torch.full_like(g, 6)) for g in found)


def test_a_backward_pass_leaves_nothing_alive() -> None:
    x, weights, A, B, biases = two()
    ys = fused_linear(x * 1.0, weights, biases, A, B, [[1.0], [0.5]])
    node = weakref.ref(ys[0].grad_fn.next_functions[0][0])
    dys = [torch.ones_like(y) for y in ys]
    alive = [weakref.ref(t) for t in (*ys, *dys)]
    torch.autograd.backward(ys, dys)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.backward(ys, dys)
    del ys, dys
    assert node() is None
    assert not any(ref() is not None for ref in alive)


def test_deterministic_mode_and_anomaly_mode() -> None:
    gate, up = factors()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            same_gradients(gate * up, (gate, up))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_node_reads_no_tensors_that_another_saved() -> None:
    """But what makes an input again, which is there for that."""
    for path in Path(autograd.__file__).parent.glob("*.py"):
        read = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]
        owners = {ast.unparse(n.value) for n in read if n.attr == "saved_tensors"}
        assert owners <= {"ctx"} or path.stem == "recompute", (path, owners)


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
