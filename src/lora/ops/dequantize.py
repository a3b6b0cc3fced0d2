# mypy: disable-error-code="no-untyped-call"
# torch.library's registration functions carry no types.
"""The dense form of a frozen weight that bitsandbytes quantized: bit for bit what bitsandbytes itself makes of it.

    4 bit:  W = round(code[nibble] * absmax[i // block])            i counts the weights row by row
            absmax[b] = code2[q[b]] * absmax2[b // nested] + offset     where the absmax is quantized as well
    8 bit:  W = round(CB * (SCB * (1 / 127)))                       SCB of the row

Each product and sum is rounded to fp32 by itself, and the result once more to the dtype asked for. Two weights share a
byte, the first in the high nibble (Dettmers et al., "QLoRA", 2023, and "LLM.int8()", 2022). The functions here are the
plain-torch form, which is the CPU path and the oracle; `kernels/dequantize.py` is the CUDA path.

Two things of bitsandbytes' 4-bit CUDA kernels stay theirs: FP4's second zero is negative, though `code` has none such,
and what is below the smallest normal fp32 number becomes zero.
"""

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoraError

LIBRARY = torch.library.Library("lora", "FRAGMENT")
LIBRARY.define(
    "dequantize(Tensor[] parts, str format, ScalarType dtype) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
FORMAT = re.compile(r"(int8|nf4|fp4):(\d+)x(\d+)(?::([1-9]\d*))?(?::([1-9]\d*))?")
INVERSE = 1 / 127


@dataclass(frozen=True)
class Format:
    """How a weight is stored, and in how many tensors.

    | kind     | tensors                                                                                          |
    |----------|--------------------------------------------------------------------------------------------------|
    | int8     | CB (out, in) int8, SCB (out,) fp32                                                               |
    | nf4, fp4 | packed: ceil(out in / 2) bytes of any dtype and shape, absmax (blocks,) fp32, code (16,) fp32    |
    | nested   | packed, absmax (blocks,) uint8, code, absmax2 (ceil(blocks / nested),), code2 (256,), offset ()  |

    Args:
        shape: (out, in); block: weights that share an absmax; nested: absmax values that share an absmax2, or 0.
    """

    kind: str
    shape: tuple[int, int]
    block: int = 0
    nested: int = 0

    def __str__(self) -> str:
        return format_text(self.kind, self.shape, self.block, self.nested)

    @staticmethod
    @functools.cache
    def parse(text: str) -> "Format":
        """The format that `str` wrote as text, such as nf4:4096x14336:64:256 or int8:4096x14336."""
        match = FORMAT.fullmatch(text)
        if match is None or (match[1] in ("nf4", "fp4")) != (match[4] is not None):
            raise LoraError(
                f"format = {text!r}; allowed: int8:OUTxIN, nf4:OUTxIN:BLOCK and nf4:OUTxIN:BLOCK:NESTED,"
                " and fp4 alike; write it with str(Format(...))"
            )
        kind, *numbers = match.groups()
        rows, columns, block, nested = (int(n or 0) for n in numbers)
        return Format(kind, (rows, columns), block, nested)

    @functools.cached_property
    def layout(self) -> list[tuple[int, torch.dtype | None]]:
        """Elements and dtype of each tensor that stores such a weight; None: bytes, in any dtype."""
        rows, columns = self.shape
        if self.kind == "int8":
            return [(rows * columns, torch.int8), (rows, torch.float32)]
        blocks = -(-rows * columns // self.block)
        plain: list[tuple[int, torch.dtype | None]] = [
            (-(-rows * columns // 2), None),
            (blocks, torch.uint8 if self.nested else torch.float32),
            (16, torch.float32),
        ]
        outer = (-(-blocks // self.nested), 256, 1) if self.nested else ()
        return plain + [(n, torch.float32) for n in outer]

    @property
    def tensors(self) -> int:
        """How many tensors store such a weight."""
        return len(self.layout)


def format_text(kind: str, shape: tuple[int, int], block: int = 0, nested: int = 0) -> str:
    """`str(Format(...))`, for each forward pass: cached nowhere, since what compiled code reads must not grow."""
    text = f"{kind}:{shape[0]}x{shape[1]}"
    if block:
        text += f":{block}:{nested}" if nested else f":{block}"
    return text


def dequantize(parts: Sequence[Tensor], format: str, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in dtype.

    Args:
        parts: the tensors of `Format`, in its order, on one device; format: `str(Format(...))`.
    """
    weight: Tensor = torch.ops.lora.dequantize(list(parts), format, dtype)
    return weight


def element(parts: Sequence[Tensor], format: str, row: int, column: int, dtype: torch.dtype) -> Tensor:
    """`dequantize(parts, format, dtype)[row, column]`, a tensor without dimensions, at the price of a few reads."""
    form = Format.parse(format)
    if form.kind == "int8":
        return (parts[0][row, column].float() * (parts[1][row] * INVERSE)).to(dtype)
    index = row * form.shape[1] + column
    byte = _bytes(parts[0])[index // 2].long()
    block = index // form.block
    absmax = parts[1][block]
    if form.nested:
        absmax = parts[4][absmax.long()] * parts[3][block // form.nested] + parts[5].reshape(())
    return (parts[2][byte & 15 if index % 2 else byte >> 4] * absmax).to(dtype)


def _bytes(packed: Tensor) -> Tensor:
    """The packed nibbles (bytes,) uint8, whatever dtype holds them."""
    flat = packed.reshape(-1)
    return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)


class Packed:
    """A stored weight for code that is within an operator already; what can be done once for all its uses is.

    Args:
        parts: the tensors of `Format`, in its order, on one device; format: `str(Format(...))`.

    Raises:
        LoraError: the parts are not of that format.
    """

    def __init__(self, parts: Sequence[Tensor], format: str) -> None:
        self.parts, self.form = parts, Format.parse(format)
        fits = len(parts) == self.form.tensors
        if fits:  # a loop: every product over a quantized weight comes through here
            for t, (size, dtype) in zip(parts, self.form.layout, strict=True):
                elements_fit = t.numel() == size and t.dtype == dtype if dtype else t.numel() * t.itemsize == size
                fits = fits and elements_fit
        if not fits:
            raise LoraError(
                f"parts = {[(tuple(t.shape), t.dtype) for t in parts]}; allowed for {format}, as elements and dtype "
                f"(None: bytes): {self.form.layout}; take them from the weight and its quantization state"
            )
        self._launch: Callable[[Tensor], Tensor] | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), its memory the caller's."""
        if not self.parts[0].is_cuda or not _in_kernel(self.form):
            return _reference(self.parts, self.form, dtype)
        if self._launch is None:
            self._launch = _launch(self.parts, self.form)
        out = torch.empty(self.form.shape, dtype=dtype, device=self.parts[0].device)
        with torch.cuda.device_of(out):
            return self._launch(out)


# The operator on the CPU, and wherever triton is not.


def _blockwise_(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Multiply values (n,) in place, each block of them by its scale; the last block may be short."""
    blocks = values.numel() // block
    values[: blocks * block].view(-1, block).mul_(scales[:blocks, None])
    values[blocks * block :].mul_(scales[blocks : blocks + 1])
    return values


def _reference(parts: Sequence[Tensor], form: Format, dtype: torch.dtype) -> Tensor:
    if form.kind == "int8":
        return (parts[0] * (parts[1] * INVERSE)[:, None]).to(dtype)
    packed, absmax, code, *outer = parts
    if form.nested:
        absmax2, code2, offset = outer
        absmax = _blockwise_(code2.index_select(0, absmax.int()), absmax2, form.nested) + offset
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)  # (256, 2), by the byte
    values = pairs.index_select(0, _bytes(packed).int()).view(-1)[: form.shape[0] * form.shape[1]]
    return _blockwise_(values, absmax, form.block).view(form.shape).to(dtype)


# On CUDA.


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _in_kernel(form: Format) -> bool:
    """Whether the kernels take it: blocks of a power of two, as each of bitsandbytes' is."""
    return has_triton() and form.block % 8 == 0 and form.block & (form.block - 1) == 0


def _launch(parts: Sequence[Tensor], form: Format) -> Callable[[Tensor], Tensor]:
    """A function that writes the weight into a tensor."""
    from ..kernels.dequantize import four_bit, int8

    if form.kind == "int8":
        return int8(parts[0].contiguous(), parts[1].contiguous())
    flat = [_bytes(parts[0]), *[t.contiguous() for t in parts[1:]]]
    return four_bit(form.shape[0] * form.shape[1], flat, form.block, form.nested)


def _dense(parts: list[Tensor], format: str, dtype: torch.dtype) -> Tensor:
    return Packed(parts, format).dense(dtype)


def _fake(parts: list[Tensor], format: str, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty(Packed(parts, format).form.shape, dtype=dtype)


LIBRARY.impl("dequantize", _dense, "CPU")
LIBRARY.impl("dequantize", _dense, "CUDA")
torch.library.register_fake("lora::dequantize", _fake, lib=LIBRARY)
