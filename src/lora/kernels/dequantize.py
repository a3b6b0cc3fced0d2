"""Frozen 4-bit and 8-bit weights to 16 or 32 bits, in one launch each, bound by the bytes read and written.

Every product and sum is rounded by itself, as the layouts define them, so the launches forbid fused multiply-adds.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import Config, cdiv

# WORDS: 32-bit words of eight weights a program; COLUMNS: weights of a row a program. Measured on one H200. Two to four
# words a thread are in flight together: the loads of one alone would not cover the memory's latency.
FOUR_BIT = {"WORDS": 256, "warps": 4}
INT8 = {"COLUMNS": 4096, "warps": 8}
Launch = Callable[[Tensor], Tensor]


@triton.jit
def load_words(packed_ptr, start, left, WORDS: tl.constexpr, EVEN: tl.constexpr):
    """The packed bytes of weights start to start + 8 WORDS as little-endian words (WORDS,) int32.

    One word a thread at a time, so that its eight weights are one 16-byte store: max_contiguous keeps Triton from
    giving a thread four words in a row, whose stores would have to go through shared memory.
    """
    word = tl.max_contiguous(tl.arange(0, WORDS), 1)
    if EVEN:
        return tl.load(packed_ptr + start // 8 + word)
    words = tl.zeros((WORDS,), tl.int32)
    for i in tl.static_range(4):
        byte = tl.load(packed_ptr + start // 2 + word * 4 + i, mask=word * 4 + i < (left + 1) // 2, other=0)
        words |= byte.to(tl.int32) << (8 * i)
    return words


@triton.jit
def load_absmax(
    absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, start, left,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The absmax (WORDS,) fp32 of each word's eight weights. A block's words load the same place: L1 answers.

    Both a block and what a program covers are powers of two, so that one holds a whole number of the other.
    """
    first = tl.arange(0, WORDS) * 8
    block = (start // BLOCK).to(tl.int32) + first // BLOCK
    mask = None if EVEN else first < left
    absmax = tl.load(absmax_ptr + block, mask=mask)
    if NESTED > 0:
        scale = tl.load(absmax2_ptr + block // NESTED, mask=mask)
        absmax = tl.load(code2_ptr + absmax.to(tl.int32), mask=mask) * scale + tl.load(offset_ptr)
    return absmax


@triton.jit
def look_up(words, code_ptr, WORDS: tl.constexpr):
    """The code's values (WORDS, 8) fp32 of the nibbles, in the weights' order: a byte's high nibble is first.

    The sixteen values lie in shared memory; a tree of selects would be bound by arithmetic, and reads of the code from
    L1 by their addresses.
    """
    shift = (tl.arange(0, 8) ^ 1) * 4
    nibble = (words[:, None] >> shift[None, :]) & 15
    code = tl.load(code_ptr + tl.arange(0, 16))
    return tl.reshape(tl.gather(code, tl.reshape(nibble, (WORDS * 8,)), 0), (WORDS, 8))


@triton.jit
def dequantize_4bit_kernel(
    packed_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, out_ptr, n,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out = round(code[nibble] * absmax[block]), each program 8 WORDS weights of n in row-major order.

    packed: ceil(n / 2) bytes, read as int32 if EVEN; absmax (blocks,) fp32, or uint8 if NESTED, and then
    code2[absmax] * absmax2[block // NESTED] + offset; code (16,), absmax2 (ceil(blocks / NESTED),), code2 (256,),
    offset (1,) fp32; out (n,) of any float dtype. Reads n / 2 bytes and the absmax, writes 2 n bytes: 148 MB for
    4096 x 14336 with nested blocks of 64: 35 us.
    """
    start = tl.program_id(0).to(tl.int64) * (WORDS * 8)
    left = tl.minimum(n - start, WORDS * 8).to(tl.int32)
    words = load_words(packed_ptr, start, left, WORDS, EVEN)
    absmax = load_absmax(absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, start, left, BLOCK, NESTED, WORDS, EVEN)
    values = look_up(words, code_ptr, WORDS) * absmax[:, None]
    place = tl.arange(0, WORDS * 8)
    values = tl.reshape(values, (WORDS * 8,)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + start + place, values, mask=None if EVEN else place < left)


@triton.jit
def dequantize_int8_kernel(codes_ptr, scales_ptr, out_ptr, columns, chunks, COLUMNS: tl.constexpr):
    """out = round(codes * (scales / 127)), each program COLUMNS of one row, which is cut into chunks of them.

    codes (R, C) int8; scales (R,) fp32, the largest magnitude of each row; out (R, C). The scale is multiplied by
    fp32(1 / 127) first. Reads n bytes, writes 2 n: 176 MB for 4096 x 14336: 41 us.
    """
    row = tl.program_id(0) // chunks
    column = tl.program_id(0) % chunks * COLUMNS + tl.max_contiguous(tl.arange(0, COLUMNS), 8)  # 16 bytes a store
    start = row.to(tl.int64) * columns
    mask = column < columns
    scale = tl.load(scales_ptr + row) * (1 / 127)
    values = tl.load(codes_ptr + start + column, mask=mask).to(tl.float32) * scale
    tl.store(out_ptr + start + column, values.to(out_ptr.dtype.element_ty), mask=mask)


def four_bit(n: int, parts: Sequence[Tensor], block: int, nested: int, config: Config | None = None) -> Launch:
    """A function that writes the n weights that the parts store into a tensor (out, in), contiguous, and returns that.

    Args:
        parts: packed (ceil(n / 2),) uint8, absmax (blocks,), code (16,), and, where the absmax is itself quantized in
            blocks of `nested`, absmax2, code2 (256,) and offset; all contiguous.
        block: weights that share an absmax, a power of two from 8 on; nested: 0 for an fp32 absmax.
        config: as FOUR_BIT, which holds where None is given.
    """
    if n == 0:
        return lambda out: out
    config = config or FOUR_BIT
    words = config["WORDS"]
    packed, absmax, code, *rest = parts
    absmax2, code2, offset = rest if nested else (None, None, None)
    even = n % (words * 8) == 0 and packed.data_ptr() % 4 == 0 and packed.storage_offset() % 4 == 0
    packed = packed.view(torch.int32) if even else packed
    kernel = dequantize_4bit_kernel[(cdiv(n, words * 8),)]

    def launch(out: Tensor) -> Tensor:
        kernel(
            packed, absmax, code, absmax2, code2, offset, out, n,
            BLOCK=block, NESTED=nested, WORDS=words, EVEN=even, num_warps=config["warps"], enable_fp_fusion=False,
        )  # fmt: skip
        return out

    return launch


def int8(codes: Tensor, scales: Tensor, config: Config | None = None) -> Launch:
    """A function that writes codes * (scales / 127) into a tensor (R, C), and returns that.

    Args:
        codes: (R, C) int8; scales: (R,) fp32; all contiguous. config: as INT8, which holds where None is given.
    """
    rows, columns = codes.shape
    if codes.numel() == 0:
        return lambda out: out
    config = config or INT8
    chunks = cdiv(columns, config["COLUMNS"])
    kernel = dequantize_int8_kernel[(rows * chunks,)]

    def launch(out: Tensor) -> Tensor:
        kernel(
            codes, scales, out, columns, chunks,
            COLUMNS=config["COLUMNS"], num_warps=config["warps"], enable_fp_fusion=False,
        )  # fmt: skip
        return out

    return launch
