"""Dequantization against bitsandbytes, bit for bit: plain torch, then the Triton kernels against plain torch.

The kernels run through Triton's interpreter, which must be switched on before triton is imported: this file is run
again in a process of its own for them.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora.bases.eight_bit import EightBitLayout
from lora.bases.four_bit import FourBitLayout
from lora.errors import LoraError
from lora.ops.dequantize import Layout, layout, layout_text

dequantize = torch.ops.lora.dequantize
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(63, 341), (1, 1), (5, 64), (3, 130), (64, 128)]
FOUR_BITS = list(itertools.product(("nf4", "fp4"), (False, True)))

four_bits = pytest.mark.parametrize(("kind", "nested"), FOUR_BITS, ids=lambda v: {True: "nested"}.get(v, v or "plain"))
# The interpreter cuts fp32 off to bf16 where a GPU rounds to the nearest.
interpreted_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that test_kernels_through_the_interpreter starts"
)


@pytest.fixture
def bnb() -> Iterator[ModuleType]:
    """bitsandbytes, whose plain-torch functions would otherwise be compiled for each shape."""
    module = pytest.importorskip("bitsandbytes")
    with torch.compiler.set_stance("force_eager"):
        yield module


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also in the sign of zero and of NaN."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    whole = kinds[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def quantized(
    bnb: ModuleType, w: Tensor, kind: str, block: int, nested: bool, storage: torch.dtype = torch.uint8
) -> tuple[list[Tensor], str, object]:
    """(parts, format, quant_state)"""
    packed, state = bnb.functional.quantize_4bit(
        w, blocksize=block, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )
    parts = [packed, state.absmax, state.code]
    if nested:
        parts += [state.state2.absmax, state.state2.code, state.offset]
    return parts, layout_text(kind, (w.shape[0], w.shape[1]), block, 256 if nested else 0), state


def defined(bnb: ModuleType, packed: Tensor, state: object, dtype: torch.dtype) -> Tensor:
    """What bitsandbytes' plain-torch backend makes of it, which rounds as its CUDA kernels do.

    Its CPU kernels are no oracle: with AVX-512 they take a block to end with the row, so that a weight whose rows are
    no multiple of the block comes out wrong, and they give FP4's second zero the sign that `code` does not have.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    data = packed.reshape(-1).view(torch.uint8)
    return _dequantize_4bit_compute(data, absmax, state.code, state.blocksize, state.shape, dtype)


def made(kind: str, shape: tuple[int, int], block: int = 0, nested: int = 0, seed: int = 0) -> tuple[list[Tensor], str]:
    """Parts of any bits, without bitsandbytes: the kernels need no weight that someone quantized."""
    form = layout(layout_text(kind, shape, block, nested))
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(count, generator=generator) if dtype == torch.float32
        else torch.randint(256, (count,), generator=generator, dtype=torch.uint8)
        for count, dtype in form.parts
    ]  # fmt: skip
    if kind == "int8":
        parts[0] = parts[0].view(torch.int8).view(shape)
    return parts, str(form)


# Formats.

sizes = st.integers(0, 2**40)
counts = st.integers(1, 2**20)
formats = st.one_of(
    st.builds(EightBitLayout, st.just("int8"), st.tuples(sizes, sizes)),
    st.builds(FourBitLayout, st.sampled_from(["nf4", "fp4"]), st.tuples(sizes, sizes), counts, st.integers(0, 2**20)),
)


@given(formats)
def test_format_round_trip(form: Layout) -> None:
    assert layout(str(form)) == form
    assert len(form.parts) == {"int8": 2}.get(form.kind, 6 if getattr(form, "nested", 0) else 3)


def test_format_text() -> None:
    assert str(FourBitLayout("nf4", (4096, 14336), 64, 256)) == "nf4:4096x14336:64:256"
    assert str(FourBitLayout("fp4", (4096, 14336), 64)) == "fp4:4096x14336:64"
    assert str(EightBitLayout("int8", (4096, 14336))) == "int8:4096x14336"


@pytest.mark.parametrize(
    "text", ["", "nf4:4x4", "nf4:4x4:0", "int8:4x4:64", "int4:4x4", "dense:4x4", "nf4:4x4:64:256:1"]
)
def test_no_format(text: str) -> None:
    with pytest.raises(LoraError, match="allowed"):
        layout(text)


# Plain torch.


@dtypes
@four_bits
@pytest.mark.parametrize("block", [32, 64, 128, 256, 4096])
def test_four_bit(bnb: ModuleType, kind: str, nested: bool, block: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        parts, form, state = quantized(bnb, random(*shape).to(dtype), kind, block, nested)
        weight = dequantize(parts, form, dtype)
        assert weight.shape == shape
        assert same_bits(weight, defined(bnb, parts[0], state, dtype)), shape


@dtypes
@four_bits
def test_four_bit_is_what_the_public_function_gives(
    bnb: ModuleType, kind: str, nested: bool, dtype: torch.dtype
) -> None:
    for rows, columns, block in [(64, 128, 64), (7, 256, 256), (63, 341, 64)]:
        parts, form, state = quantized(bnb, random(rows, columns).to(dtype), kind, block, nested)
        assert torch.equal(dequantize(parts, form, dtype), bnb.functional.dequantize_4bit(parts[0], state))


@four_bits
def test_subnormal_overflowing_and_empty_blocks(bnb: ModuleType, kind: str, nested: bool) -> None:
    w = random(8, 64)
    for row, scale in enumerate((0.0, 1e-38, 1e-30, 1e-7, 1e-5, 6e4, 1e6, 1e30)):
        w[row] *= scale
    parts, form, state = quantized(bnb, w, kind, 64, nested)
    for dtype in DTYPES:
        assert same_bits(dequantize(parts, form, dtype), defined(bnb, parts[0], state, dtype))


@pytest.mark.parametrize("storage", [torch.int8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(-1, 1), (1, -1), (-1,)])
def test_any_storage(bnb: ModuleType, storage: torch.dtype, shape: tuple[int, ...]) -> None:
    w = random(6, 160)
    plain, form, _ = quantized(bnb, w, "nf4", 64, True)
    parts, _, _ = quantized(bnb, w, "nf4", 64, True, storage)
    assert parts[0].dtype == storage
    parts[0] = parts[0].view(shape)
    assert same_bits(dequantize(parts, form, torch.bfloat16), dequantize(plain, form, torch.bfloat16))
    assert same_bits(layout(form).element(parts, 5, 159), layout(form).element(plain, 5, 159))


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_int8(bnb: ModuleType, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """MatMul8bitFp's product with the unit matrix is the weight that it multiplies by."""
    from bitsandbytes.autograd._functions import MatMul8bitFp, MatmulLtState

    state = MatmulLtState()
    state.CB, state.SCB, _ = bnb.functional.int8_vectorwise_quant(random(*shape).half())
    state.has_fp16_weights = False
    theirs = MatMul8bitFp.apply(torch.eye(shape[1], dtype=dtype), state.CB, None, None, state).t()
    form = str(EightBitLayout("int8", shape))
    assert same_bits(dequantize([state.CB, state.SCB], form, dtype), theirs)


def test_int8_rounds_once() -> None:
    """Every code times scales whose products lie close to ties of the 16-bit types, as the in-place product has it."""
    codes = torch.arange(-128, 128, dtype=torch.int8).expand(512, 256).contiguous()
    scales = random(512).abs() * torch.logspace(-8, 4, 512)
    for dtype in DTYPES:
        theirs = codes.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
        assert same_bits(dequantize([codes, scales], "int8:512x256", dtype), theirs)


CASES = [("nf4", 64, 256), ("nf4", 64, 0), ("fp4", 32, 2), ("int8", 0, 0)]


@dtypes
@pytest.mark.parametrize(("kind", "block", "nested"), CASES)
def test_element(kind: str, block: int, nested: int, dtype: torch.dtype) -> None:
    parts, form = made(kind, (9, 41), block, nested)
    weight = dequantize(parts, form, dtype)
    for row, column in [(0, 0), (0, 1), (3, 17), (8, 39), (8, 40)]:
        value = layout(form).element(parts, row, column).to(dtype)
        assert value.shape == () and same_bits(value[None], weight[row, column][None])


@pytest.mark.parametrize(("kind", "block", "nested"), CASES)
def test_opcheck(kind: str, block: int, nested: int) -> None:
    parts, form = made(kind, (9, 41), block, nested)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.lora.dequantize, (parts, form, dtype))


@pytest.mark.parametrize(("kind", "block", "nested"), CASES)
def test_compiles_whole(kind: str, block: int, nested: int) -> None:
    parts, form = made(kind, (9, 41), block, nested)

    def run(x: Tensor, parts: list[Tensor]) -> Tensor:
        return torch.nn.functional.linear(x, dequantize(parts, form, torch.float32))

    x = random(3, 41).requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, parts)
    eager = run(x, parts)
    assert same_bits(compiled, eager)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (compiled, eager)]
    assert same_bits(*grads)


@pytest.mark.parametrize(("kind", "block", "nested"), CASES)
def test_parts_that_do_not_fit_are_named(kind: str, block: int, nested: int) -> None:
    parts, form = made(kind, (9, 41), block, nested)
    for wrong in (parts[:-1], [*parts, parts[0]], [parts[0], parts[1][1:], *parts[2:]], [parts[0], *parts[:-1]]):
        with pytest.raises(LoraError, match="allowed for"):
            dequantize(wrong, form, torch.float32)


def test_no_rows() -> None:
    for kind, block, nested in CASES:
        parts, form = made(kind, (0, 41), block, nested)
        assert dequantize(parts, form, torch.float16).shape == (0, 41)


# The kernels.


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu"]
    run = subprocess.run(
        [*command, "-k", "kernel", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def poisoned(shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


FOUR_BIT_CASES = [  # shape, block, nested, words a program: whole tiles and ragged ones, blocks over and under a tile
    ((63, 341), 64, 256, 128),
    ((63, 341), 64, 0, 512),
    ((1, 1), 64, 256, 512),
    ((5, 64), 128, 2, 16),
    ((16, 256), 64, 4, 512),
    ((16, 256), 32, 0, 64),
    ((16, 1024), 4096, 256, 128),
    ((16, 1024), 256, 0, 256),
    ((9, 1000), 2048, 3, 64),
]


@needs_interpreter
@interpreted_dtypes
@pytest.mark.parametrize(("shape", "block", "nested", "words"), FOUR_BIT_CASES)
def test_kernel_four_bit(shape: tuple[int, int], block: int, nested: int, words: int, dtype: torch.dtype) -> None:
    from lora.kernels.dequantize import four_bit

    parts, form = made("nf4", shape, block, nested)
    config = {"WORDS": words, "warps": 4}
    out = four_bit(shape[0] * shape[1], parts, block, nested, config)(poisoned(shape, dtype))
    assert same_bits(out, dequantize(parts, form, dtype))


@needs_interpreter
def test_kernel_reads_packed_bytes_of_any_alignment() -> None:
    from lora.kernels.dequantize import four_bit

    parts, form = made("nf4", (16, 256), 64, 256)
    truth = dequantize(parts, form, torch.float16)
    for shift in range(1, 5):
        parts[0] = torch.cat([parts[0].new_zeros(shift), parts[0]])[shift:]
        assert same_bits(four_bit(16 * 256, parts, 64, 256)(poisoned((16, 256), torch.float16)), truth)


@needs_interpreter
@interpreted_dtypes
@pytest.mark.parametrize("shape", [(63, 341), (1, 1), (5, 4096), (3, 4100)])
def test_kernel_int8(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from lora.kernels.dequantize import int8

    (codes, scales), form = made("int8", shape)
    truth = dequantize([codes, scales], form, dtype)
    assert same_bits(int8(codes, scales)(poisoned(shape, dtype)), truth)
    config = {"COLUMNS": 256, "warps": 4}
    assert same_bits(int8(codes, scales, config)(poisoned(shape, dtype)), truth)


@needs_interpreter
@pytest.mark.parametrize(("kind", "block", "nested"), [("nf4", 64, 256), ("fp4", 32, 0), ("int8", 0, 0)])
def test_kernel_that_a_layout_launches(kind: str, block: int, nested: int) -> None:
    parts, form = made(kind, (9, 41), block, nested)
    truth = dequantize(parts, form, torch.float16)
    if block:
        parts[0] = parts[0].view(1, -1)
    launch = layout(form).launch(parts)
    assert launch is not None
    assert same_bits(launch(poisoned((9, 41), torch.float16)), truth)


@needs_interpreter
@pytest.mark.parametrize("block", [4, 48])
def test_kernel_takes_no_other_blocks(block: int) -> None:
    parts, form = made("nf4", (9, 41), block)
    assert layout(form).launch(parts) is None


@needs_interpreter
def test_kernel_of_no_rows() -> None:
    from lora.kernels.dequantize import four_bit, int8

    parts, _ = made("nf4", (0, 64), 64)
    assert four_bit(0, parts, 64, 0)(torch.empty(0, 64)).shape == (0, 64)
    assert int8(*made("int8", (0, 64))[0])(torch.empty(0, 64)).shape == (0, 64)


# On a GPU.


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize(("shape", "block", "nested", "words"), FOUR_BIT_CASES)
def test_gpu_four_bit(shape: tuple[int, int], block: int, nested: int, words: int, dtype: torch.dtype) -> None:
    from lora.kernels.dequantize import four_bit

    parts, form = made("nf4", shape, block, nested)
    config = {"WORDS": words, "warps": 2}
    on_gpu = [t.cuda() for t in parts]
    out = four_bit(shape[0] * shape[1], on_gpu, block, nested, config)(poisoned(shape, dtype, "cuda"))
    assert same_bits(out.cpu(), dequantize(parts, form, dtype))


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize(("kind", "block", "nested"), CASES)
def test_gpu_operator(kind: str, block: int, nested: int, dtype: torch.dtype) -> None:
    for shape in [*SHAPES, (64, 4096)]:
        parts, form = made(kind, shape, block, nested)
        on_gpu = [t.cuda() for t in parts]
        assert same_bits(dequantize(on_gpu, form, dtype).cpu(), dequantize(parts, form, dtype))
    torch.library.opcheck(torch.ops.lora.dequantize, (on_gpu, form, dtype))


@pytest.mark.gpu
@dtypes
@four_bits
def test_gpu_bitsandbytes(bnb: ModuleType, kind: str, nested: bool, dtype: torch.dtype) -> None:
    """By value: bitsandbytes' CUDA kernel gives FP4's second zero a sign, which its own code does not have."""
    for shape in [(63, 341), (64, 4096)]:
        parts, form, state = quantized(bnb, random(*shape).to("cuda", dtype), kind, 64, nested)
        assert torch.equal(dequantize(parts, form, dtype), bnb.functional.dequantize_4bit(parts[0], state))


@pytest.mark.gpu
def test_gpu_more_weights_than_an_int32_counts() -> None:
    shape, tail = (66000, 32768), 4 * 32768
    form = FourBitLayout("nf4", shape, 64)
    parts = [
        torch.randint(256, (form.parts[0][0],), device="cuda", dtype=torch.uint8),
        torch.rand(form.parts[1][0], device="cuda"),
        torch.randn(16, device="cuda"),
    ]
    end = [parts[0][-tail // 2 :].cpu(), parts[1][-tail // 64 :].cpu(), parts[2].cpu()]
    truth = dequantize(end, "nf4:4x32768:64", torch.bfloat16)
    assert same_bits(dequantize(parts, str(form), torch.bfloat16)[-4:].cpu(), truth)
    codes = torch.randint(-128, 128, shape, device="cuda", dtype=torch.int8)
    scales = torch.rand(shape[0], device="cuda")
    truth = dequantize([codes[-4:].cpu(), scales[-4:].cpu()], "int8:4x32768", torch.bfloat16)
    assert same_bits(dequantize([codes, scales], str(EightBitLayout("int8", shape)), torch.bfloat16)[-4:].cpu(), truth)
