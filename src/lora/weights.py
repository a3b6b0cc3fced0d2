"""The frozen weight W0 of a layer, however it is stored, as one small protocol.

A new way to store it (int8, NF4) is one more class and one more line in `weight_of`; nothing else changes.
"""

from typing import Protocol

import torch
from torch import Tensor, nn


class FrozenWeight(Protocol):
    """W0, seen as an (out, in) matrix."""

    @property
    def parameter(self) -> Tensor:
        """The tensor that stores it."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""

    def dense(self) -> Tensor:
        """The matrix, (out, in); a view where the storage allows one."""

    def write_(self, rows: slice, values: Tensor) -> None:
        """Put `values` (n, in) in place of some rows, in the storage's dtype."""


class Dense:
    """nn.Linear: stored as (out, in)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def parameter(self) -> Tensor:
        return self.module._parameters["weight"]  # type: ignore[return-value]  # quicker than `.weight`, each step

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.dense().shape
        return out_features, in_features

    def dense(self) -> Tensor:
        return self.parameter

    def write_(self, rows: slice, values: Tensor) -> None:
        with torch.no_grad():
            self.dense()[rows].copy_(values)


class Transposed(Dense):
    """transformers' Conv1D (GPT-2): stored as (in, out)."""

    def dense(self) -> Tensor:
        return self.parameter.t()


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, told without an import of transformers."""
    return any(
        c.__qualname__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__
    )


def weight_of(module: nn.Module) -> FrozenWeight | None:
    """The frozen weight of a module that computes `W0 x (+ bias)`, or None where the library knows no such."""
    if isinstance(module, nn.Linear):
        return Dense(module)
    if is_conv1d(module):
        return Transposed(module)
    return None
