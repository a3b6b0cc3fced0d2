"""The seeded dropout mask in plain torch: bit for bit the one that the Triton kernels draw in registers.

Philox2x32 of 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), one call for eight
elements. With `group, lane = divmod(col, 256)` and `part, c = divmod(lane, 32)`, element (row, col) takes the part-th
byte of the two words that the counter (row, 32 group + c) gives, and stays if that byte is at least the call's limit:
the upper byte of the 16-bit threshold, or one more, by a byte of an eighth round, in (lower byte) / 256 of the calls.
So the probability is exact to 1 / 65536. The seed's low half is the key; its high half shifts the second counter.
"""

import torch
from torch import Tensor

GROUP, PART, ROUNDS = 256, 32, 7
MULTIPLIER, WEYL, WORD = 0xD256D193, 0x9E3779B9, 0xFFFFFFFF


def threshold(p: float) -> int:
    """The dropout probability in 65536ths; at most 255 / 256, as a byte decides (at p = 1 the scale is 0 instead)."""
    return min(round(p * 65536), 65280)


def inverse_keep(p: float) -> float:
    """1 / (1 - p) for the p that `threshold` rounds to, so that the mean is kept exactly; 0 where nothing stays."""
    return 65536 / (65536 - threshold(p)) if p < 1 else 0.0


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed (1,) int64 from torch's generator of the device: repeatable, checkpoint-safe, graph-safe."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask (rows, columns), True where the element stays, for a seed of one int64 element."""
    groups = -(-columns // GROUP)
    seed = seed.reshape(())
    low = (torch.arange(groups * PART, device=seed.device) + ((seed >> 32) & WORD)) & WORD
    low = low.expand(rows, groups * PART)
    high = torch.arange(rows, device=seed.device)[:, None].expand(rows, groups * PART)
    key = seed & WORD
    for _ in range(ROUNDS):
        high, low, key = _round(high, low, key)
    dither = _round(high, low, key)[0] & 0xFF
    limit = (threshold(p) >> 8) + (dither < (threshold(p) & 0xFF)).long()
    stays = torch.stack([((word >> shift) & 0xFF) >= limit for word in (high, low) for shift in (0, 8, 16, 24)])
    return stays.view(8, rows, groups, PART).permute(1, 2, 0, 3).reshape(rows, groups * GROUP)[:, :columns]


def _round(high: Tensor, low: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # MULTIPLIER * high, its 64 bits in two halves: int64 would overflow.
    small = MULTIPLIER * (high & 0xFFFF)
    large = MULTIPLIER * (high >> 16) + (small >> 16)
    return (large >> 16) ^ key ^ low, ((large & 0xFFFF) << 16) | (small & 0xFFFF), (key + WEYL) & WORD
