"""lora::frozen_linear: the product with a quantized weight, against torch on the dequantized one."""

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora import LoraError
from lora.ops.dequantize import Packed
from lora.ops.frozen_linear import frozen_linear

dequantize = torch.ops.lora.dequantize
IN, OUT = 64, 48
INT8, NF4 = f"int8:{OUT}x{IN}", f"nf4:{OUT}x{IN}:64:256"
formats = pytest.mark.parametrize("form", [INT8, NF4])
biased = pytest.mark.parametrize("with_bias", [False, True])


def parts_of(form: str, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    if form == INT8:
        codes = torch.randint(-127, 128, (OUT, IN), generator=generator, dtype=torch.int8)
        parts = [codes, torch.rand(OUT, generator=generator) + 0.5]
    else:
        blocks = OUT * IN // 64
        parts = [
            torch.randint(0, 256, (OUT * IN // 2, 1), generator=generator, dtype=torch.uint8),
            torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8),
            torch.linspace(-1, 1, 16),
            torch.rand(math.ceil(blocks / 256), generator=generator),
            torch.linspace(0, 1, 256),
            torch.tensor(0.1),
        ]
    return [t.to(device) for t in parts]


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: random(IN),
    "matrix": lambda: random(7, IN),
    "columns": lambda: random(IN, 7).t(),
    "batch": lambda: random(2, 5, IN),
    "transposed batch": lambda: random(5, 2, IN).transpose(0, 1),
    "batch of one row each": lambda: random(1, 5, IN).transpose(0, 1),
    "four": lambda: random(2, 3, 2, IN),
    "no rows": lambda: random(0, IN),
    "no rows in a batch": lambda: random(2, 0, IN),
}


@formats
@biased
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_torchs_product_with_the_dequantized_weight(form: str, layout: str, with_bias: bool) -> None:
    x = LAYOUTS[layout]().requires_grad_()
    bias = random(OUT).requires_grad_() if with_bias else None
    leaves = [x] if bias is None else [x, bias]
    parts = parts_of(form)
    weight = dequantize(parts, form, torch.float32)
    y = frozen_linear(x, parts, form, bias)
    rows = x.reshape(-1, IN)
    plain = torch.nn.functional.linear(rows, weight, bias).view(*x.shape[:-1], OUT)
    assert y.shape == plain.shape
    assert torch.equal(y, plain)
    for dy in (random(*y.shape), random(*y.shape).transpose(0, -1).contiguous().transpose(0, -1)):
        found, truth = (torch.autograd.grad(out, leaves, dy, retain_graph=True) for out in (y, plain))
        for mine, its in zip(found, truth, strict=True):
            assert mine.shape == its.shape
            torch.testing.assert_close(mine, its)
    y.view(-1, OUT).mul_(2)  # as a hook or a model may
    assert torch.equal(y, 2 * plain)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("layout", LAYOUTS)
@biased
def test_is_one_product_each_way(layout: str, with_bias: bool) -> None:
    """Torch would take some strides as a batch of products, with a copy of the weight for each."""
    x, bias = LAYOUTS[layout]().requires_grad_(), random(OUT) if with_bias else None
    parts = parts_of(INT8)
    out = frozen_linear(x, parts, INT8, bias)
    others = out.transpose(0, -2).contiguous().transpose(0, -2) if out.dim() > 1 else out
    for dy in (out.detach(), others.detach()):
        with torch.profiler.profile() as seen:
            frozen_linear(x, parts, INT8, bias).backward(dy)
        names = [e.key for e in seen.key_averages() for _ in range(e.count)]
        assert "aten::bmm" not in names
        assert names.count("aten::mm") + names.count("aten::addmm") == 2


@formats
def test_saves_nothing(form: str) -> None:
    def pack(t: Tensor) -> Tensor:
        raise AssertionError(tuple(t.shape))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = frozen_linear(random(3, IN).requires_grad_(), parts_of(form), form, random(OUT).requires_grad_())
    y.sum().backward()


@formats
def test_the_dense_weight_does_not_outlive_a_call(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    real = Packed.dense

    def seen(self: Packed, dtype: torch.dtype) -> Tensor:
        made.append(weakref.ref(weight := real(self, dtype)))
        return weight

    monkeypatch.setattr(Packed, "dense", seen)
    y = frozen_linear(random(3, IN).requires_grad_(), parts_of(form), form, None)
    assert [w() for w in made] == [None]
    y.sum().backward()
    assert [w() for w in made] == [None, None]


@formats
def test_a_weight_changed_before_the_backward_pass(form: str) -> None:
    parts = parts_of(form)
    bias = random(OUT).requires_grad_()
    y = frozen_linear(random(3, IN).requires_grad_(), parts, form, bias).sum()
    of_the_bias = frozen_linear(random(3, IN), parts, form, bias).sum()
    parts[-1].mul_(2)
    of_the_bias.backward()  # which does not read the weight
    with pytest.raises(LoraError, match="a weight was changed after the forward pass"):
        y.backward()


@formats
def test_transforms_of_torch_func_are_refused(form: str) -> None:
    with pytest.raises(LoraError, match="torch.func's transforms"):
        torch.func.grad(lambda x: frozen_linear(x, parts_of(form), form, None).sum())(random(3, IN))


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(LoraError, match=r"parts = .*allowed for int8:48x64.*take them from the weight"):
        frozen_linear(random(3, IN), parts_of(INT8)[:1], INT8, None)
    with pytest.raises(LoraError, match=r"parts = .*allowed for nf4:48x64"):
        frozen_linear(random(3, IN), parts_of(INT8), NF4, None)


@formats
@biased
@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN)])
def test_opcheck(form: str, shape: tuple[int, ...], with_bias: bool) -> None:
    x, bias = random(*shape).requires_grad_(), random(OUT).requires_grad_() if with_bias else None
    torch.library.opcheck(torch.ops.lora.frozen_linear, (x, parts_of(form), form, bias))
    y = torch.ops.lora.frozen_linear(x, parts_of(form), form, bias)
    plain = torch.nn.functional.linear(x, dequantize(parts_of(form), form, x.dtype), bias)
    leaves = [x] if bias is None else [x, bias]
    found, truth = (torch.autograd.grad(out, leaves, random(*y.shape)) for out in (y, plain))
    for mine, its in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, its)


@formats
@biased
def test_compiles_whole(form: str, with_bias: bool) -> None:
    x, bias = random(2, 3, IN).requires_grad_(), random(OUT).requires_grad_() if with_bias else None
    leaves = [x] if bias is None else [x, bias]
    parts = parts_of(form)
    compiled = torch.compile(lambda x: frozen_linear(x.tanh(), parts, form, bias), fullgraph=True, backend="aot_eager")
    mine, eager = compiled(x), frozen_linear(x.tanh(), parts, form, bias)
    assert torch.equal(mine, eager)
    dy = random(*mine.shape)
    found, truth = (torch.autograd.grad(out, leaves, dy) for out in (mine, eager))
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


# On a GPU.


@pytest.mark.gpu
@formats
@biased
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(300, IN), (2, 150, IN)])
def test_on_the_card(form: str, shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype) -> None:
    torch._dynamo.reset()  # the cases share one code object, whose compiled forms are limited
    parts = parts_of(form, "cuda")
    x = random(*shape, dtype=dtype, device="cuda").requires_grad_()
    bias = random(OUT, dtype=dtype, device="cuda").requires_grad_() if with_bias else None
    leaves = [x] if bias is None else [x, bias]
    weight = dequantize(parts, form, dtype)
    y = frozen_linear(x, parts, form, bias)
    plain = torch.nn.functional.linear(x.view(-1, IN), weight, bias).view(*shape[:-1], OUT)
    assert torch.equal(y, plain)
    rows = random(*y.shape, dtype=dtype, device="cuda")
    for dy in (rows, rows.transpose(0, -1).contiguous().transpose(0, -1)):
        found, truth = (torch.autograd.grad(out, leaves, dy, retain_graph=True) for out in (y, plain))
        for mine, its in zip(found, truth, strict=True):
            torch.testing.assert_close(mine, its)
    compiled = torch.compile(lambda x: frozen_linear(x, parts, form, bias), fullgraph=True)
    assert torch.equal(compiled(x), y)
    for mine, its in zip(torch.autograd.grad(compiled(x), leaves, dy), truth, strict=True):
        torch.testing.assert_close(mine, its)
    torch.library.opcheck(torch.ops.lora.frozen_linear, (x, parts, form, bias))
