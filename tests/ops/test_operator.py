"""lora::fused_linear: the plain-torch form against float64 and numerical gradients, and the CUDA path on the card."""

import contextlib
import itertools
import weakref

import pytest
import torch
from torch import Tensor

from lora import LoraError
from lora.ops import reference
from lora.ops.operator import fused_linear, make_copies
from lora.ops.philox import inverse_keep, keep_mask

Problem = tuple[Tensor, list[Tensor], list[Tensor] | None, list[list[Tensor]], list[list[Tensor]], list[list[float]]]


def problem(
    rows: int, width: int, outs: tuple[int, ...], ranks: tuple[tuple[int, ...], ...],
    dtype: torch.dtype = torch.float32, masters: torch.dtype = torch.float32, bias: bool = True, device: str = "cpu",
) -> Problem:  # fmt: skip
    """Random x, weights, biases, and A, B, scalings by target and adapter; all but the weights and biases trained."""
    generator = torch.Generator().manual_seed(rows + width + sum(outs))

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x = draw(rows, width).requires_grad_()
    weights = [draw(n, width) / width**0.5 for n in outs]
    biases = [draw(n) for n in outs] if bias else None
    A = [[draw(r, width, dtype=masters).div_(width**0.5).requires_grad_() for r in target] for target in ranks]
    B = [[draw(n, r, dtype=masters).requires_grad_() for r in target] for n, target in zip(outs, ranks, strict=True)]
    scalings = [[0.5 + i + j for j, _ in enumerate(target)] for i, target in enumerate(ranks)]
    return x, weights, biases, A, B, scalings


def flatten(groups: list[list[Tensor]]) -> list[Tensor]:
    return [t for group in groups for t in group]


def composed(args: Problem, p: float, seed: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The formula as one would write it in `dtype`, with the mask given."""
    x, weights, biases, A, B, scalings = args
    x = x.to(dtype)
    dropped = x
    if seed is not None:
        dropped = (x.double() * keep_mask(seed, x.shape[0], x.shape[1], p) * inverse_keep(p)).to(dtype)
    ys = []
    for i, w in enumerate(weights):
        y = torch.nn.functional.linear(x, w.to(dtype), biases[i].to(dtype) if biases else None)
        for a, b, s in zip(A[i], B[i], scalings[i], strict=True):
            y = y + s * (dropped @ a.to(dtype).t()) @ b.to(dtype).t()
        ys.append(y)
    return ys


def results(ys: list[Tensor], args: Problem) -> list[Tensor]:
    """Outputs, then the gradients of x, A and B for one fixed set of dy."""
    inputs = [args[0], *flatten(args[3]), *flatten(args[4])]
    generator = torch.Generator().manual_seed(11)
    dys = [torch.randn(y.shape, generator=generator).to(y) for y in ys]
    return [*ys, *torch.autograd.grad(ys, inputs, dys)]


def assert_as_good_as_plain(args: Problem, p: float, seed: Tensor | None) -> None:
    """Errors against float64 within twice those of the composition in the same dtype."""
    truth = results(composed(args, p, seed, torch.float64), args)
    plain = results(composed(args, p, seed, args[0].dtype), args)
    mine = results(fused_linear(*args, p, seed), args)
    slack = 8 if args[0].dtype == torch.float32 else 1  # there the order of summation is all that differs
    for m, q, t in zip(mine, plain, truth, strict=True):
        m, q, t = m.detach().double(), q.detach().double(), t.detach()
        floor = slack * torch.finfo(args[0].dtype).eps * float(t.norm())
        assert float((m - t).norm()) <= 2 * float((q - t).norm()) + floor


GROUP = ((3, 2), (4,))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "rank"), [(63, 341, 7), (5, 64, 1), (130, 48, 24)])
def test_matches_float64(rows: int, width: int, rank: int, dtype: torch.dtype, p: float) -> None:
    args = problem(rows, width, (33, 20), ((rank, 2), (rank,)), dtype)
    assert_as_good_as_plain(args, p, torch.tensor([123456789012345]) if p else None)


@pytest.mark.parametrize(("p", "bias"), [(0.0, True), (0.3, False)])
def test_numerical_gradients(p: float, bias: bool) -> None:
    args = problem(3, 6, (5, 4), GROUP, torch.float64, torch.float64, bias)
    x, weights, biases, A, B, scalings = args
    trained = [t.requires_grad_() for t in (*weights, *(biases or []))]
    seed = torch.tensor([4]) if p else None

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(fused_linear(x, weights, biases, A, B, scalings, p, seed))

    torch.autograd.gradcheck(run, (x, *trained, *flatten(A), *flatten(B)))


@pytest.mark.parametrize("quantized", [False, True])
def test_gradients_where_only_biases_train(quantized: bool) -> None:
    x, weights, biases, A, B, scalings = problem(7, 12, (5, 4), ((2,), (3,)))
    for t in (x, *flatten(A), *flatten(B)):
        t.requires_grad_(False)
    assert biases is not None
    biases = [b.requires_grad_() for b in biases]
    formats = ""
    if quantized:
        weights = [t for n in (5, 4) for t in (torch.full((n, 12), 3, dtype=torch.int8), torch.rand(n))]
        formats = "int8:5x12;int8:4x12"
    first, _ = fused_linear(x, weights, biases, A, B, scalings, formats=formats)
    dy = torch.randn(7, 5)
    found = torch.autograd.grad(first, biases, dy, allow_unused=True)
    assert torch.equal(found[0], dy.sum(0))
    assert found[1] is None or not found[1].any()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(p: float) -> None:
    x, weights, biases, A, B, scalings = problem(7, 12, (5, 4), GROUP)
    copies = make_copies(A, B, scalings, x.dtype)
    seed = torch.tensor([4]) if p else None
    masters, rest = (biases, flatten(A), flatten(B)), (*copies, p, seed)
    torch.library.opcheck(torch.ops.lora.fused_linear, (x, *masters, weights, "", *rest))
    int8 = [t for n in (5, 4) for t in (torch.full((n, 12), 3, dtype=torch.int8), torch.rand(n))]
    torch.library.opcheck(torch.ops.lora.fused_linear, (x, *masters, int8, "int8:5x12;int8:4x12", *rest))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_whole(p: float) -> None:
    args = problem(6, 12, (5, 4), GROUP)
    seed = torch.tensor([4]) if p else None
    compiled = torch.compile(lambda *a: fused_linear(*a, p, seed), fullgraph=True, backend="aot_eager")
    for mine, eager in zip(results(compiled(*args), args), results(fused_linear(*args, p, seed), args), strict=True):
        assert torch.equal(mine, eager)


def test_fresh_adapter_changes_no_bit() -> None:
    x, weights, biases, A, B, scalings = problem(9, 20, (6,), ((4,),), torch.bfloat16)
    with torch.no_grad():
        B[0][0].zero_()
    expected = torch.nn.functional.linear(x, weights[0], biases[0])
    assert torch.equal(fused_linear(x, weights, biases, A, B, scalings)[0], expected)


def test_leading_dimensions_no_rows_and_strided_input() -> None:
    x, *rest = problem(24, 12, (5,), ((4,),))
    flat = fused_linear(x, *rest)[0]
    assert torch.equal(fused_linear(x.view(2, 3, 4, 12), *rest)[0], flat.view(2, 3, 4, 5))
    assert torch.allclose(fused_linear(x.detach().t().contiguous().t(), *rest)[0], flat, atol=1e-6)
    empty = x.detach()[:0].requires_grad_()
    y = fused_linear(empty, *rest)[0]
    assert y.shape == (0, 5)
    y.sum().backward()
    assert not rest[2][0][0].grad.any()


def test_one_mask_in_both_directions_and_a_fresh_one_each_call() -> None:
    x, weights, _, A, B, scalings = problem(40, 64, (8,), ((8,),), bias=False)
    torch.manual_seed(1)
    first = fused_linear(x, weights, None, A, B, scalings, 0.5)[0]
    second = fused_linear(x, weights, None, A, B, scalings, 0.5)[0]
    torch.manual_seed(1)
    assert torch.equal(fused_linear(x, weights, None, A, B, scalings, 0.5)[0], first)
    assert not torch.equal(first, second)


def test_saves_x_and_h_alone() -> None:
    args = problem(64, 128, (32, 32), ((4,), (4,)), torch.bfloat16, bias=False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_linear(*args, 0.1)
    given = {t.data_ptr() for t in (args[0], *args[1])}
    fresh = [t for t in saved if t.data_ptr() not in given and t.shape[0] == 64]
    assert [tuple(t.shape) for t in fresh] == [(64, 8)]


class LigerSiLUMulFunction(torch.autograd.Function):
    """A stand-in of Liger's: saves its two inputs, and overwrites them in its backward pass."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, gate_multiplier: float = 1.0) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.gate_multiplier = gate_multiplier
        ctx.save_for_backward(a, b)
        return torch.nn.functional.silu(a.float() * gate_multiplier).to(b.dtype) * b

    @staticmethod
    def backward(ctx, dc: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        a, b = (t.detach() for t in ctx.saved_tensors)
        with torch.enable_grad():
            inputs = a.clone().requires_grad_(), b.clone().requires_grad_()
            product = torch.nn.functional.silu(inputs[0].float() * ctx.gate_multiplier).to(b.dtype) * inputs[1]
        da, db = torch.autograd.grad(product, inputs, dc)
        a.data.fill_(float("nan"))  # unseen by autograd, as from a Triton kernel
        b.data.fill_(float("nan"))
        return da, db, None


def through_a_product(make, keep: bool) -> tuple[bool, list[Tensor]]:  # type: ignore[no-untyped-def]
    """(whether the product is alive after the forward pass, the gradients); `keep`: it must be saved, by a hook."""
    _, weights, _, A, B, scalings = problem(12, 24, (10,), ((3,),), bias=False)
    a, b = (torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (1, 2))
    x = make(a * 1.0, b * 1.0)
    alive = weakref.ref(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if keep else contextlib.nullcontext():
        (y,) = fused_linear(x, weights, None, A, B, scalings)
    del x
    saved = alive() is not None
    return saved, list(torch.autograd.grad(y.sin().sum(), [a, b, A[0][0], B[0][0]]))


@pytest.mark.parametrize("make", [torch.mul, LigerSiLUMulFunction.apply], ids=["mul", "liger"])
def test_a_product_is_made_again_and_not_saved(make) -> None:  # type: ignore[no-untyped-def]
    saved, got = through_a_product(make, keep=False)
    assert not saved
    saved, want = through_a_product(make, keep=True)
    assert saved
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_node_of_ligers_name_that_computes_something_else_is_not_believed(size: float) -> None:
    """At any size: values near zero are all near to each other."""

    class Clamped(LigerSiLUMulFunction):
        @staticmethod
        def forward(ctx, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
            ctx.save_for_backward(a, b)
            ctx.gate_multiplier = 1.0
            return LigerSiLUMulFunction.forward(ctx, a, b).clamp(-0.1 * size, 0.1 * size)

    Clamped.__name__ = "LigerSiLUMulFunction"
    kind = type("LigerSiLUMulFunction", (Clamped,), {})
    assert kind.apply(*torch.ones(2, 3).requires_grad_()).grad_fn.name() == "LigerSiLUMulFunctionBackward"
    assert through_a_product(lambda a, b: kind.apply(size * a, b), keep=False)[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: a * b[0, 0],
        lambda a, b: a * b[:, :1],
        torch.add,
        lambda a, b: LigerSiLUMulFunction.apply(a, b, 0.7),
    ],
    ids=["vector", "broadcast", "sum", "multiplier"],
)
def test_what_autograd_does_not_hold_is_saved(make) -> None:  # type: ignore[no-untyped-def]
    assert through_a_product(make, keep=False)[0]


def test_a_checkpoint_does_not_repeat_the_last_products(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, _, A, B, scalings = problem(6, 12, (12,), ((3,),), bias=False)
    real, calls = reference.products, []
    monkeypatch.setattr(reference, "products", lambda *a: calls.append(1) or real(*a))

    def layer(x: Tensor) -> Tensor:
        return fused_linear(fused_linear(x, weights, None, A, B, scalings)[0].tanh(), weights, None, A, B, scalings)[0]

    want = torch.autograd.grad(layer(x).sin().sum(), [x, A[0][0], B[0][0]])
    calls.clear()
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    got = torch.autograd.grad(y.sin().sum(), [x, A[0][0], B[0][0]])
    assert len(calls) == 3  # two forward, and the first of them again
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_a_weight_changed_before_the_backward_pass_is_noticed() -> None:
    x, weights, _, A, B, scalings = problem(6, 12, (12,), ((3,),), bias=False)
    (y,) = fused_linear(x, weights, None, A, B, scalings)
    weights[0].add_(1)
    with pytest.raises(LoraError, match="a weight was changed after the forward pass"):
        y.sum().backward()


def test_an_unused_output_has_no_gradient() -> None:
    x, weights, biases, A, B, scalings = problem(6, 12, (5, 4), GROUP)
    fused_linear(x, weights, biases, A, B, scalings)[0].sum().backward()
    assert A[0][0].grad.abs().sum() > 0
    assert not A[1][0].grad.any()


# On the card.

CARD = list(itertools.product((torch.bfloat16, torch.float16, torch.float32), (0.0, 0.05)))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 7, 16, 24, 64, 200, 512])
@pytest.mark.parametrize(("dtype", "p"), CARD)
@pytest.mark.parametrize(
    ("rows", "width", "outs", "small"),
    [
        (63, 341, (63,), 2048),
        (63, 341, (63,), 0),
        (500, 341, (100, 63), 0),
        (2100, 341, (2600,), 2048),
        (2048, 1024, (2048, 1024), 2048),
    ],
)
def test_on_the_card(
    rows: int,
    width: int,
    outs: tuple[int, ...],
    small: int,
    dtype: torch.dtype,
    p: float,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`small`: the rows under which the kernels leave a call to cuBLAS; 0 has them run on odd sizes."""
    from lora.ops import launch, plan

    monkeypatch.setattr(plan, "SMALL", small)
    monkeypatch.setattr(launch, "plan", plan.plan.__wrapped__)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    args = problem(
        rows, width, outs, tuple((rank, 5) if i == 0 else (rank,) for i, _ in enumerate(outs)), dtype, device="cuda"
    )
    seed = torch.tensor([123456789012345], device="cuda") if p else None
    assert_as_good_as_plain(args, p, seed)
    first, second = (results(fused_linear(*args, p, seed), args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("small", [0, 4096])
def test_strided_tensors_and_no_rows_on_the_card(small: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora.ops import launch, plan

    monkeypatch.setattr(plan, "SMALL", small)
    monkeypatch.setattr(launch, "plan", plan.plan.__wrapped__)
    x, *rest = problem(2304, 320, (264, 72), ((16,), (7,)), torch.bfloat16, device="cuda")
    seed = torch.tensor([4], device="cuda") if p else None
    leaves = [t for group in (*rest[2], *rest[3]) for t in group]
    dys = [torch.randn(2304, n, device="cuda", dtype=torch.bfloat16) for n in (264, 72)]

    def found(rows: int, strided: bool) -> list[Tensor]:
        inputs = [t.detach()[:rows] for t in (x, *dys)]
        inputs = [t.t().contiguous().t() if strided else t.clone() for t in inputs]
        inputs[0].requires_grad_()
        ys = fused_linear(inputs[0], *rest, p, seed)
        return [*ys, *torch.autograd.grad(ys, [inputs[0], *leaves], inputs[1:])]

    for mine, plain in zip(found(2304, True), found(2304, False), strict=True):
        torch.testing.assert_close(mine, plain, rtol=0.02, atol=0.02 * plain.abs().max().item())
    assert not any(g.any() for g in found(0, True)[3:])


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck_on_the_card(p: float) -> None:
    x, weights, biases, A, B, scalings = problem(300, 64, (40, 24), GROUP, torch.bfloat16, device="cuda")
    copies = make_copies(A, B, scalings, x.dtype)
    seed = torch.tensor([4], device="cuda") if p else None
    masters, rest = (biases, flatten(A), flatten(B)), (*copies, p, seed)
    torch.library.opcheck(torch.ops.lora.fused_linear, (x, *masters, weights, "", *rest))


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_compiles_on_the_card(p: float) -> None:
    args = problem(2048, 1024, (2048, 1024), ((16,), (16,)), torch.bfloat16, device="cuda")
    seed = torch.tensor([4], device="cuda") if p else None
    compiled = torch.compile(lambda *a: fused_linear(*a, p, seed), fullgraph=True)
    for mine, eager in zip(results(compiled(*args), args), results(fused_linear(*args, p, seed), args), strict=True):
        torch.testing.assert_close(mine, eager, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_a_captured_graph_draws_a_fresh_mask_each_replay() -> None:
    args = problem(2048, 1024, (2048,), ((16,),), torch.bfloat16, bias=False, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(fused_linear(*args, 0.3), args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    dy = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.graph(graph):
        y = fused_linear(*args, 0.3)[0]
        dx, dA, dB = torch.autograd.grad(y, [args[0], args[3][0][0], args[4][0][0]], dy)
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append([t.clone() for t in (y, dx, dA, dB)])
    assert all(t.isfinite().all() for t in seen[0])
    assert not any(torch.equal(a, b) for a, b in zip(*seen, strict=True))
