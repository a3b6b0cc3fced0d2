"""The frozen weight W0 of a layer, however it is stored, as one small protocol.

A new way to store it is one more class here, a line in `weight_of`, its format in `ops/dequantize.py`, and its name in
`targets.KNOWN_CLASSES`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from .bitsandbytes import EightBit, FourBit, Stored


class FrozenWeight(Protocol):
    """W0, seen as an (out, in) matrix."""

    @property
    def quantization(self) -> str | None:
        """None, "nf4", "fp4" or "int8"."""

    @property
    def parameter(self) -> Tensor:
        """The parameter that stores it, in its own layout."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""

    @property
    def dtype(self) -> torch.dtype:
        """What `dense()` gives where it is not told."""

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that the module computes with for an input x, which is not x's own where a quantizer says so."""

    def output_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the module's output for an input x."""

    def stored(self) -> Stored:
        """What the fused operator takes."""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix, (out, in); a view where the storage allows one."""

    def at(self, row: int, column: int) -> Tensor:
        """One element, 0-dim; in fp32 where it is dequantized."""


class Dense:
    """nn.Linear: stored as (out, in)."""

    quantization: str | None = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def parameter(self) -> Tensor:
        return self.module._parameters["weight"]  # type: ignore[return-value]  # quicker than `.weight`, each step

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.dense().shape
        return out_features, in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def output_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def stored(self) -> Stored:
        return [self.dense()], ""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.parameter if dtype is None else self.parameter.to(dtype)

    def at(self, row: int, column: int) -> Tensor:
        return self.dense()[row, column]

    def write_(self, rows: slice, values: Tensor) -> None:
        """Put `values` (n, in) in place of some rows, in the storage's dtype."""
        with torch.no_grad():
            self.dense()[rows].copy_(values)


class Transposed(Dense):
    """transformers' Conv1D (GPT-2): stored as (in, out)."""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return super().dense(dtype).t()


CONV1D = "transformers.pytorch_utils", "Conv1D"


def comes_from(module_class: type[nn.Module], package: str, *names: str) -> bool:
    """Whether a class is, or comes from, one of these of a package; told without an import of it."""
    return any(c.__qualname__ in names and c.__module__.startswith(package) for c in module_class.__mro__)


def class_from(module: nn.Module, package: str, *names: str) -> bool:
    """`comes_from` of a module's class."""
    return comes_from(type(module), package, *names)


def is_conv1d(module: nn.Module) -> bool:
    return class_from(module, *CONV1D)


def weight_of(module: nn.Module) -> FrozenWeight | None:
    """The frozen weight of a module that computes `W0 x (+ bias)`, or None where the library knows no such."""
    kind = weight_kind(type(module))
    return None if kind is None else kind(module)


def weight_kind(module_class: type[nn.Module]) -> Callable[[nn.Module], FrozenWeight] | None:
    """What makes the frozen weight of a module of this class."""
    if issubclass(module_class, nn.Linear):
        if comes_from(module_class, "bitsandbytes.", "Linear4bit"):
            return FourBit
        return EightBit if comes_from(module_class, "bitsandbytes.", "Linear8bitLt") else Dense
    return Transposed if comes_from(module_class, *CONV1D) else None
