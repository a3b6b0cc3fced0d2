"""The size of each update in an adapter file: ||s B A||, without B A and without torch.

    ||B A||^2 = sum of (B^T B) . (A A^T)        both (r, r), in float64; "." element by element

The products are taken by blocks, so that a file of any size needs little memory.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import scaling
from ..errors import LoraError
from .adapter import AdapterFile
from .bounded import clip
from .description import natural
from .header import CONFIG_FILE, TENSOR_FILE, Entry
from .settings import config_of

if TYPE_CHECKING:
    from numpy import ndarray

BLOCK = 1 << 20  # elements that are in float64 at a time
MOST = 8192  # ranks, whose squares are held


@dataclass(frozen=True)
class Norm:
    """Frobenius norm of s B A of one module; nan or inf where the file holds such."""

    module: str
    norm: float
    rank: int


def norms(file: AdapterFile) -> list[Norm]:
    """Of each module with both halves, in the order of the layers. Reads each half once.

    Raises:
        LoraError: a half of a dtype that no adapter has.
    """
    import numpy as np

    if file.config["peft_type"] != "LORA":
        raise LoraError(f"{file.folder}: it holds no low-rank update, of which a norm could be told; leave --norms out")
    config = config_of(file.config, CONFIG_FILE)
    assert config.alpha is not None
    starts, place = {}, len(file.header)
    for key, entry in file.entries.items():
        starts[key], place = place, place + entry.nbytes
    found = []
    for module, keys in sorted(file.modules.items(), key=lambda item: natural(item[0])):
        halves = {key.partition(".lora_")[2].removesuffix(".weight").removeprefix("embedding_"): key for key in keys}
        if not {"A", "B"} <= halves.keys():
            continue
        a, b = file.entries[halves["A"]], file.entries[halves["B"]]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            continue  # no linear update; `describe` shows it
        rank = a.shape[0]
        if rank > MOST:
            where = f"{file.folder / TENSOR_FILE}: {clip(module, 200)}"
            raise LoraError(f"{where} has rank {rank:,}; norms are told up to {MOST:,}")
        s = scaling(module, config.alpha, config.alpha_pattern, rank, config.rslora) if rank else 0.0
        gram_a = _gram(file, starts[halves["A"]], a, transposed=True)
        gram_b = _gram(file, starts[halves["B"]], b, transposed=False)
        with np.errstate(invalid="ignore", over="ignore"):
            square = float((gram_a * gram_b).sum())
        found.append(Norm(module, abs(s) * math.sqrt(max(square, 0.0)) if square == square else math.nan, rank))
    return found


def _gram(file: AdapterFile, start: int, entry: Entry, transposed: bool) -> "ndarray[Any, Any]":
    """A A^T of A (r, in), or B^T B of B (out, r): (r, r) in float64."""
    import numpy as np

    rows, columns = entry.shape
    rank = rows if transposed else columns
    total = np.zeros((rank, rank))
    if transposed:  # a row of A is long and lies in one piece: all rows at once, by columns of what was read
        whole = _values(file, start, entry.dtype, rows * columns).reshape(rows, columns)
        step = max(1, BLOCK // max(1, rows))
        blocks = [whole[:, i : i + step].astype(np.float64) for i in range(0, columns, step)]
        for block in blocks:
            total += block @ block.T
        return total
    step = max(1, BLOCK // max(1, columns))
    size = entry.nbytes // max(1, rows)
    for i in range(0, rows, step):
        count = min(step, rows - i)
        block = _values(file, start + i * size, entry.dtype, count * columns).reshape(count, columns).astype(np.float64)
        total += block.T @ block
    return total


def _values(file: AdapterFile, start: int, dtype: str, count: int) -> "ndarray[Any, Any]":
    """So many values of the tensor file; bf16 widened to fp32, which numpy has in its place."""
    import numpy as np

    kinds = {"float32": np.float32, "float16": np.float16, "float64": np.float64, "bfloat16": np.uint16}
    if dtype not in kinds:
        raise LoraError(f"{file.folder / TENSOR_FILE}: {clip(dtype, 50)} has no norm; convert the adapter to float32")
    kind = np.dtype(kinds[dtype])
    file.source.seek(start)
    read = np.frombuffer(file.source.read(count * kind.itemsize), kind)
    if len(read) != count:
        raise LoraError(f"{file.folder / TENSOR_FILE}: cut short while it was read; copy it again")
    return (read.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else read
