"""`fit`: the largest batch that the memory takes, by the estimate of `estimate.py`, before the model is loaded.

The rows of an optimizer step stay as many as the recipe says: batch_size x grad_accum is kept, so a batch_size is tried
only where it divides that product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import OutOfMemoryError
from .estimate import GIB, estimate
from .recipe import Recipe

SHARE = 0.92
"""Of the free memory that a run may fill by the estimate: the rest is what the allocator keeps in pieces."""


@dataclass(frozen=True)
class Fitted:
    """The batch that was chosen; peak and free in bytes. `str()` says it in one line."""

    batch_size: int
    grad_accum: int
    peak: int
    free: int
    asked: tuple[int, int]

    def __str__(self) -> str:
        before, times = self.asked
        rows = before * times
        return (
            f"fit: batch_size {self.batch_size}, grad_accum {self.grad_accum} (asked: {before} and {times}; {rows} "
            f"rows a step, so the divisors of {rows} were tried): {self.peak / GIB:.2f} GiB of {self.free / GIB:.2f} "
            "free"
        )

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with this batch."""
        return recipe.model_copy(update={"batch_size": self.batch_size, "grad_accum": self.grad_accum})


def largest_batch(
    recipe: Recipe, *, longest: int | None = None, free: int | None = None,
    peak: Callable[[int, int], int] | None = None,
) -> Fitted:  # fmt: skip
    """The largest batch_size that fits, and the grad_accum that keeps the rows of a step.

    Args:
        longest: tokens of the longest row, if the rows are known; None is the recipe's max_length.
        free: bytes; None asks the machine.
        peak: bytes for (batch_size, grad_accum); None estimates them.

    Raises:
        OutOfMemoryError: not even one row fits.
    """
    free = free_memory() if free is None else free

    def estimated(batch_size: int, grad_accum: int) -> int:
        changed = recipe.model_copy(update={"batch_size": batch_size, "grad_accum": grad_accum})
        return estimate(changed, tokens=longest, padded=not recipe.packing).peak

    asked = recipe.batch_size, recipe.grad_accum
    rows = asked[0] * asked[1]
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    peaks: dict[int, int] = {}
    low, high = 0, len(sizes)  # the first `low` of them fit, those from `high` on do not
    while low < high:
        middle = (low + high) // 2
        size = sizes[middle]
        peaks[size] = (peak or estimated)(size, rows // size)
        if peaks[size] <= SHARE * free:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        raise OutOfMemoryError(
            f"fit: one row takes {peaks[1] / GIB:.2f} GiB by the estimate, and {SHARE:.0%} of {free / GIB:.2f} GiB may "
            "be filled; try gradient_checkpointing, quantize, a smaller max_length, r or model, or free the device"
        )
    chosen = sizes[low - 1]
    return Fitted(chosen, rows // chosen, peaks[chosen], free, asked)


def free_memory() -> int:
    """Bytes that a run can take: on the GPU, with what torch holds there already, or else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return available(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))


def available(meminfo: Path, cgroup: Path) -> int:
    """Bytes of the machine's memory that are free or can be freed, within the limit of a container."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free
