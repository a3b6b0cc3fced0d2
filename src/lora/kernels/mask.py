"""The seeded dropout mask in registers, to the bit that of `ops/philox.py`, which says how it is drawn.

A byte an element takes half the arithmetic of 16 bits. Columns 32 apart share a call, so that the thread that draws a
word also uses it.
"""

import triton
import triton.language as tl


@triton.jit
def _round(high, low, key):
    multiplier = tl.full(high.shape, 0xD256D193, tl.uint32)
    return tl.umulhi(high, multiplier) ^ key ^ low, high * multiplier, key + tl.full(key.shape, 0x9E3779B9, tl.uint32)


@triton.jit
def dropout_words(rows, group, seed_ptr, threshold):
    """(high, low, limit), each (n, 32), of one group of columns; rows (n, 1), group a number, seed int64 in memory."""
    seed = tl.load(seed_ptr)
    key = (seed & 0xFFFFFFFF).to(tl.uint32)
    shift = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    columns = (group * 32 + tl.arange(0, 32)).to(tl.uint32)[None, :] + shift
    high = rows.to(tl.uint32) + tl.zeros_like(columns)
    low = columns + tl.zeros_like(high)
    for _ in tl.static_range(7):
        high, low, key = _round(high, low, key)
    dither, _, _ = _round(high, low, key)
    limit = (threshold >> 8) + ((dither & 0xFF).to(tl.int32) < (threshold & 0xFF)).to(tl.int32)
    return high, low, limit.to(tl.uint32) << 24


@triton.jit
def kept(high, low, limit, part: tl.constexpr):
    """Whether each element of one part (0 to 7) stays."""
    word = high if part < 4 else low
    return (word << (24 - 8 * (part % 4))) >= limit


@triton.jit
def masked(x, high, low, limit, part: tl.constexpr):
    return tl.where(kept(high, low, limit, part), x, 0.0)


@triton.jit
def side_by_side(x0, x1, x2, x3, x4, x5, x6, x7):
    """Eight (n, 32) tiles as one of (n, 256)."""
    left = tl.join(tl.join(x0, x4), tl.join(x2, x6))  # (n, 32, high bit, middle bit)
    right = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    tile = tl.permute(tl.join(left, right), (0, 2, 3, 4, 1))  # (n, high, middle, low bit, 32)
    return tl.reshape(tile, (x0.shape[0], 256))


@triton.jit
def tile_mask(rows, group, seed_ptr, threshold):
    """The mask (n, 256) of some rows (n, 1) and one group."""
    h, lo, t = dropout_words(rows, group, seed_ptr, threshold)
    return side_by_side(
        kept(h, lo, t, 0), kept(h, lo, t, 1), kept(h, lo, t, 2), kept(h, lo, t, 3),
        kept(h, lo, t, 4), kept(h, lo, t, 5), kept(h, lo, t, 6), kept(h, lo, t, 7),
    )  # fmt: skip


@triton.jit
def _load_part(x_ptr, rows, x_stride, row_mask, group, columns, part: tl.constexpr, EVEN: tl.constexpr):
    """One part (n, 32) of some rows (n, 1) and one group."""
    cols = (group * 256 + part * 32 + tl.arange(0, 32))[None, :]
    mask = row_mask if EVEN else row_mask & (cols < columns)
    return tl.load(x_ptr + rows.to(tl.int64) * x_stride + cols, mask=mask, other=0.0)


@triton.jit
def load_parts(x_ptr, rows, x_stride, row_mask, group, columns, seed_ptr, threshold, EVEN: tl.constexpr):
    """mask * x of some rows (n, 1) and one group of 256 columns, as its eight parts."""
    x0 = _load_part(x_ptr, rows, x_stride, row_mask, group, columns, 0, EVEN)
    x1 = _load_part(x_ptr, rows, x_stride, row_mask, group, columns, 1, EVEN)
    x2 = _load_part(x_ptr, rows, x_stride, row_mask, group, columns, 2, EVEN)
    x3 = _load_part(x_ptr, rows, x_stride, row_mask, group, columns, 3, EVEN)
    x4 = _load_part(x_ptr, rows, x_stride, row_mask, group, columns, 4, EVEN)
    x5 = _load_part(x_ptr, rows, x_stride, row_mask, group, columns, 5, EVEN)
    x6 = _load_part(x_ptr, rows, x_stride, row_mask, group, columns, 6, EVEN)
    x7 = _load_part(x_ptr, rows, x_stride, row_mask, group, columns, 7, EVEN)
    h, lo, t = dropout_words(rows, group, seed_ptr, threshold)
    return (
        masked(x0, h, lo, t, 0), masked(x1, h, lo, t, 1), masked(x2, h, lo, t, 2), masked(x3, h, lo, t, 3),
        masked(x4, h, lo, t, 4), masked(x5, h, lo, t, 5), masked(x6, h, lo, t, 6), masked(x7, h, lo, t, 7),
    )  # fmt: skip


@triton.jit
def load_group(
    x_ptr, rows, x_stride, row_mask, group, columns, seed_ptr, threshold, DROPOUT: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """mask * x of some rows (n, 1) and one group of 256 columns."""
    if DROPOUT:
        x0, x1, x2, x3, x4, x5, x6, x7 = load_parts(
            x_ptr, rows, x_stride, row_mask, group, columns, seed_ptr, threshold, EVEN
        )
        return side_by_side(x0, x1, x2, x3, x4, x5, x6, x7)
    else:
        cols = (group * 256 + tl.arange(0, 256))[None, :]
        mask = row_mask if EVEN else row_mask & (cols < columns)
        return tl.load(x_ptr + rows.to(tl.int64) * x_stride + cols, mask=mask, other=0.0)
