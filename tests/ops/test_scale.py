"""lora::scale_output: y = c z + bias in plain torch, against float64; `test_kernels.py` has the kernels."""

import pytest
import torch
from torch import Tensor

from lora.ops import scale
from lora.ops.scale import scale_output

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(
    *shape: int, dtype: torch.dtype = torch.float32, bias: bool = True, wide: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    return draw(*shape, dtype=dtype), draw(shape[-1], dtype=wide), draw(shape[-1], dtype=dtype) if bias else None


def results(function, args: tuple[Tensor, Tensor, Tensor | None]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """y, then the gradients of z, scale and bias for one fixed dy."""
    y = function(*args)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    return [y.detach(), *torch.autograd.grad(y, [t for t in args if t is not None], dy)]


def composed(z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """As one would write it in z's dtype."""
    y = z * c.to(z.dtype)
    return y if bias is None else y + bias


@pytest.fixture(params=[scale.BLOCK, 700])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(63, 341), (2, 3, 5, 64), (1, 1), (7,)], ids=str)
def test_error_is_within_twice_plain_torchs(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    args = problem(*shape, dtype=dtype, bias=bias)
    truth = results(composed, tuple(None if t is None else t.detach().double().requires_grad_() for t in args))
    for mine, plain, exact in zip(results(scale_output, args), results(composed, args), truth, strict=True):
        assert (mine.shape, mine.dtype) == (plain.shape, plain.dtype)
        floor = 2 * torch.finfo(dtype).eps * exact.norm()
        assert (mine.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_rounded_once(dtype: torch.dtype) -> None:
    z, c, bias = problem(63, 341, dtype=dtype)
    y, dz, dc, _ = results(scale_output, (z, c, bias))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    assert torch.equal(y, (z.float() * c + bias.float()).to(dtype))
    assert torch.equal(dz, (dy.float() * c).to(dtype))
    assert dc.dtype == torch.float32
    torch.testing.assert_close(dc.double(), (dy.double() * z.double()).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_one_changes_no_bit(dtype: torch.dtype) -> None:
    z = problem(63, 341, dtype=dtype)[0].detach()
    z[0, :3] = torch.tensor([float("inf"), -0.0, torch.finfo(dtype).tiny / 2])
    y = scale_output(z, torch.ones(341), None)
    assert torch.equal(y, z) and torch.equal(y.signbit(), z.signbit())


@pytest.mark.parametrize("bias", [True, False])
def test_numerical_gradients_first_and_second(bias: bool) -> None:
    z, c, b = problem(3, 2, 5, dtype=torch.float64, wide=torch.float64, bias=bias)
    inputs = [t for t in (z, c, b) if t is not None]
    function = scale_output if bias else lambda z, c: scale_output(z, c, None)
    torch.autograd.gradcheck(function, inputs)
    torch.autograd.gradgradcheck(function, inputs)


def test_backward_keeps_z_alone_and_only_for_a_scale_that_trains() -> None:
    z, c, bias = problem(63, 341, dtype=torch.bfloat16)
    for train, kept in ((True, [z.data_ptr(), c.data_ptr()]), (False, [c.data_ptr()])):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            y = scale_output(z, c.detach().requires_grad_(train), bias)
        assert [t.data_ptr() for t in saved] == kept
        (dz,) = torch.autograd.grad(y, z, torch.ones_like(y))
        assert torch.equal(dz, c.to(torch.bfloat16).expand_as(dz))


def test_z_changed_before_the_backward_pass_is_noticed() -> None:
    z, c, _ = problem(4, 5)
    z = z * 1.0
    y = scale_output(z, c, None)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_strides_and_no_rows() -> None:
    z, c, bias = (t.detach() for t in problem(24, 12))
    z = z.t().contiguous().t().requires_grad_()
    same = z.detach().contiguous().requires_grad_()
    for mine, plain in zip(
        results(scale_output, (z, c.requires_grad_(), None)), results(scale_output, (same, c, None)), strict=True
    ):
        assert torch.equal(mine, plain)
    empty = z.detach()[:0].requires_grad_()
    y, dz, dc, db = results(scale_output, (empty, c, bias.requires_grad_()))
    assert y.shape == dz.shape == (0, 12)
    assert not dc.any() and not db.any()


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_compile_and_transforms(bias: bool) -> None:
    args = problem(3, 7, 12, bias=bias)
    torch.library.opcheck(torch.ops.lora.scale_output, args)
    compiled = torch.compile(scale_output, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(results(compiled, args), results(scale_output, args), strict=True):
        assert torch.equal(mine, eager)
    z, c, b = args
    through = torch.func.grad(lambda c: scale_output(z.detach(), c, b).sum())(c.detach())
    torch.testing.assert_close(through, z.detach().sum((0, 1)))


# On the card.


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(63, 341), (2, 3, 5, 64), (8192, 4096), (0, 12)], ids=str)
def test_on_the_card(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    args = problem(*shape, dtype=dtype, bias=bias, device="cuda")
    got, again = (results(scale_output, args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    truth = results(composed, tuple(None if t is None else t.detach().double().requires_grad_() for t in args))
    for mine, plain, exact in zip(got, results(composed, args), truth, strict=True):
        floor = 2 * torch.finfo(dtype).eps * exact.norm()
        assert (mine.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + floor
    ones = torch.ones(shape[-1], device="cuda")
    assert torch.equal(scale_output(args[0], ones, None), args[0])


@pytest.mark.gpu
def test_opcheck_and_compile_on_the_card() -> None:
    args = problem(3, 7, 12, dtype=torch.bfloat16, device="cuda")
    torch.library.opcheck(torch.ops.lora.scale_output, args)
    for mine, eager in zip(
        results(torch.compile(scale_output, fullgraph=True), args), results(scale_output, args), strict=True
    ):
        torch.testing.assert_close(mine, eager, rtol=2e-2, atol=2e-2)
