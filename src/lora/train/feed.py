"""The rows of each optimizer step, in their order, pass after pass; where a run is in them is one number."""

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from ..data.encode import Encoded
from ..data.order import batches

Item = Any  # a row (Encoded), or a pack: a list of rows


class Feed:
    """Hands out the rows of one step after another; Trainer takes it for its loader.

    A step's rows do not depend on the micro-batches that they are taken in, and a pass not on the ones before it: the
    order is a function of the seed and the pass.

    Args:
        items: rows, or packs of rows.
        size: items of a step.
        steps: how many steps the run has.
        group: put items of like length into one step.

    position: how many steps' rows were handed out, which is all that a resume needs.
    """

    def __init__(self, items: Sequence[Item], size: int, steps: int, seed: int, group: bool) -> None:
        self.items, self.size, self.steps, self.seed, self.group = items, size, steps, seed, group
        self.lengths = [sum(len(row["input_ids"]) for row in rows_of(item)) for item in items]
        self.position = 0
        self.taken: list[int] = []  # the items that were handed out last, from 1
        self._pass, self._order = -1, list[list[int]]()

    @property
    def per_pass(self) -> int:
        """Steps of one pass over the rows."""
        return math.ceil(len(self.items) / self.size)

    def take(self) -> list[Item]:
        """The rows of the next step."""
        number, index = divmod(self.position, self.per_pass)
        if number != self._pass:
            self._pass, self._order = number, batches(self.lengths, self.size, self.seed, number, self.group)
        self.position += 1
        self.taken = [item + 1 for item in self._order[index]]
        return [self.items[item] for item in self._order[index]]

    def __len__(self) -> int:
        return max(1, self.steps)

    def __iter__(self) -> Iterator[list[Item]]:
        while True:
            yield self.take()


def rows_of(item: Item) -> list[Encoded]:
    """The rows of a pack, or the row itself."""
    return item if isinstance(item, list) else [item]


def digest(items: Sequence[Item]) -> str:
    """A SHA-256 of what is trained on: ids, labels and which rows share a pack."""
    found = hashlib.sha256()
    for item in items:
        for row in rows_of(item):
            for name, values in row.items():
                numbers = array("q", values if isinstance(values, list) else [values])
                found.update(f"{name} {len(numbers)} ".encode() + numbers.tobytes())
        found.update(b";")
    return found.hexdigest()
