"""What a merge kept: one entry a module, and the table of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tables import size, table


@dataclass(frozen=True)
class MergedModule:
    """What became of one module's update D in the weight's dtype, W being the merged weight.

    kept: <W - W0, D> / <D, D>: the share of the update that the merged weight has, along the update's direction.
    noise: |(W - W0) - D| / |D|: the rounding error beside the update.
    quantized: "nf4", "fp4" or "int8" where the sum was quantized again.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: float
    noise: float
    quantized: str | None = None

    @property
    def survived(self) -> float:
        """The lesser of `kept` and the cosine between W - W0 and D: quantizing again can keep an update in the mean
        and bury it under noise many times its size."""
        length = math.sqrt(max(0.0, self.noise**2 + 2 * self.kept - 1))  # |W - W0| / |D|
        return min(self.kept, self.kept / length if length else 1.0)

    @property
    def stored(self) -> str:
        """How the merged weight is stored: a dtype's name, or the quantization."""
        return self.quantized or str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class MergeReport:
    """One entry a module; `print(report)` shows a table, the modules that kept least first."""

    modules: list[MergedModule]

    @property
    def kept(self) -> float:
        """The least share of an update that any module kept."""
        return min((m.kept for m in self.modules), default=1.0)

    def __str__(self) -> str:
        worst_first = sorted(self.modules, key=lambda m: m.kept)
        rows = [[m.name, size(m.shape), m.stored, f"{m.kept:.2%}", f"{m.noise:.2%}"] for m in worst_first]
        return table(["module", "shape", "stored as", "update kept", "rounding noise"], rows)


def moments(change: Tensor, update: Tensor) -> Tensor:
    """(3,) float64 on the CPU: <C, D>, <D, D> and |C - D|^2 of what became of an update D; blocks of rows add."""
    c, d = change.double(), update.double()
    return torch.stack([(c * d).sum(), d.square().sum(), (c - d).square().sum()]).cpu()


def kept_and_noise(sums: Tensor) -> tuple[float, float]:
    """The share of the update that was kept along its own direction, and the size of the error beside the update's."""
    along, norm, lost = sums.tolist()
    return (along / norm, math.sqrt(lost / norm)) if norm else (1.0, 0.0)
