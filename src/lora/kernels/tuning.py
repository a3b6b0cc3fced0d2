"""Block sizes as data, looked up by shape class and never searched at run time.

Measured on one H200 (8192 rows, bf16, K = 1024, 4096 and 14336, r = 16, 32, 64 and 128); on a card with less shared
memory the same blocks take fewer stages.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Keys: (ranks up to, dropout). More ranks than the last key's take its row, a block of them a program.
SHRINK = {  # rows, ranks, parts of the columns (narrow, wide), warps, stages
    (32, False): (64, 32, (1, 1), 4, 4),
    (64, False): (64, 64, (1, 1), 4, 3),
    (512, False): (64, 128, (1, 1), 4, 2),
    (32, True): (32, 32, (2, 4), 4, 3),
    (64, True): (64, 64, (1, 1), 8, 3),
}
OUTER = {  # rows a step, ranks, slabs of rows (narrow, wide), warps, stages
    (32, False): (64, 32, (16, 4), 4, 3),
    (512, False): (64, 128, (8, 2), 8, 3),
    (32, True): (32, 32, (16, 4), 4, 3),
    (64, True): (32, 64, (16, 4), 4, 3),
}
GRADIENTS = {16: (256, 512), 32: (256, 256)}  # ranks up to: columns a program (up to 2048 columns, more)
Config = dict[str, int]
WIDE = 8192  # columns from which on the second number holds


class Card(NamedTuple):
    major: int  # of the compute capability; 9: Hopper
    processors: int
    memory: int  # bytes of shared memory that a program may have


@functools.cache
def card(device: torch.device) -> Card:
    properties: Any = torch.cuda.get_device_properties(device)
    return Card(properties.major, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def precision(x: Tensor) -> str:
    """Of a product: whole for the fp32 of the interpreter's tests; 16-bit operands have but one."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def cdiv(n: int, size: int) -> int:
    """How many blocks of a size cover n. triton.cdiv is for kernels, and takes microseconds of Python on the host."""
    return -(-n // size)


def power_of_two(rank: int) -> int:
    """The ranks of one tile: enough for all, and for the matrix unit at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def _config(
    table: dict[tuple[int, bool], tuple[int, int, tuple[int, int], int, int]], step: str, x: Tensor, rank: int,
    dropout: bool,
) -> Config:  # fmt: skip
    """What the table has, in as many stages as the card's memory holds; `step`: what its kernel calls the rows."""
    limits = [top for top, drops in table if drops == dropout]
    limit = min((top for top in limits if rank <= top), default=max(limits))
    rows, ranks, parts, warps, stages = table[limit, dropout]
    ranks = min(ranks, power_of_two(rank))
    if x.is_cuda:
        stages = max(1, min(stages, card(x.device).memory // ((rows + ranks) * 256 * x.element_size())))
    return {step: rows, "BR": ranks, "SPLITS": parts[x.shape[1] > WIDE], "warps": warps, "stages": stages}


def shrink_config(x: Tensor, rank: int, dropout: bool) -> Config:
    """BM rows and BR ranks a program, SPLITS parts of the columns."""
    return _config(SHRINK, "BM", x, rank, dropout)


def outer_config(x: Tensor, rank: int, dropout: bool) -> Config:
    """BN rows a step, BR ranks a program, SPLITS slabs of rows."""
    return _config(OUTER, "BN", x, rank, dropout)


def gradients_config(dy: Tensor, rank: int) -> Config:
    """BM rows a step, BC columns a program, BR ranks; rows are cut so that a multiprocessor has one program."""
    rows, ranks, stages, processors = 64, power_of_two(rank), 4, 4
    columns = GRADIENTS[ranks][dy.shape[1] > 2048]
    if dy.is_cuda:
        _, processors, memory = card(dy.device)
        left = memory // dy.element_size() - columns * ranks
        stages = max(1, min(stages, left // (rows * (columns + ranks))))
    return {"BM": rows, "BC": columns, "BR": ranks, "programs": processors, "warps": 8, "stages": stages}


def gemm_config() -> Config:
    """The tile of the large product, on Hopper alone."""
    return {"BM": 128, "BN": 256, "BK": 64, "GROUP_M": 8, "warps": 8, "stages": 3}
