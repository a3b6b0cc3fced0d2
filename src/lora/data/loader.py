"""The batches of `order` as torch's DataLoader takes them, for transformers' Trainer or any loop."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .order import batches

T = TypeVar("T")


class EpochBatches(Sampler[list[int]]):
    """A batch sampler whose order is a function of (seed, epoch), and whose position is (epoch, step).

    Trainer and accelerate call `set_epoch` before each epoch and skip the steps that a resumed run has done, which
    costs nothing: a list is cut.
    """

    drop_last = False  # what accelerate asks a batch sampler for, with batch_size and sampler

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, group: bool) -> None:
        self.lengths, self.batch_size, self.seed, self.group = lengths, batch_size, seed, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def sampler(self) -> "EpochBatches":
        """Itself: accelerate passes an epoch on to a batch sampler's sampler, also from under its own wrappers."""
        return self

    def __iter__(self) -> Iterator[list[int]]:
        return iter(batches(self.lengths, self.batch_size, self.seed, self.epoch, self.group))

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)


def train_loader(
    rows: Sequence[T], lengths: Sequence[int], batch_size: int, *, seed: int, group: bool,
    collate: Callable[[list[T]], Any], pin_memory: bool = False,
) -> DataLoader[T]:  # fmt: skip
    """The rows (or packs) in their order, for `accelerator.prepare`. Reads and moves no global generator."""
    return DataLoader(
        _Rows(rows), batch_sampler=EpochBatches(lengths, batch_size, seed, group), collate_fn=collate,
        pin_memory=pin_memory,
        # A loader draws a seed for its workers each time that it starts, from the global generator unless it has
        # one: dropout would then differ by how often a run was resumed.
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


class _Rows(Dataset[T]):
    """A sequence, by the type that DataLoader asks for."""

    def __init__(self, rows: Sequence[T]) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> T:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)
