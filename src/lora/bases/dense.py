"""Weights that are plain matrices: nn.Linear's, and transposed ones: transformers' Conv1D's and nn.Embedding's."""

import torch
from torch import Tensor

from .weight import FrozenWeight, Stored


class Dense(FrozenWeight):
    """nn.Linear: stored as (out, in)."""

    package, classes = "torch.nn.modules.linear", ("Linear",)

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.dense().shape
        return out_features, in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    def stored(self) -> Stored:
        return [self.dense()], ""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.parameter if dtype is None else self.parameter.to(dtype)

    def at(self, row: int, column: int) -> Tensor:
        return self.dense()[row, column]

    def write_(self, rows: slice, values: Tensor) -> None:
        with torch.no_grad():
            self.dense()[rows].copy_(values)


class Transposed(Dense):
    """transformers' Conv1D (GPT-2): stored as (in, out)."""

    package, classes = "transformers.pytorch_utils", ("Conv1D",)
    transposed = True

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return super().dense(dtype).t()

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.t()


class Table(Transposed):
    """nn.Embedding: a row for each token, seen as (dim, tokens), since W0 takes a one-hot token to its row."""

    package, classes = "torch.nn.modules.sparse", ("Embedding",)
    role = "embedding"
    transposed = False  # for PEFT, which does not say it of a table
