"""The order of the rows: a function of the seed and the epoch, so that a resume finds its place without a state."""

import random
from collections.abc import Sequence

from ..errors import LoraError

_CHUNK = 50  # batches whose rows are sorted together: enough for little padding, few enough that each epoch differs


def batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, group: bool) -> list[list[int]]:
    """The batches of one epoch, in the order of their steps: every row once, the last or one of them shorter.

    With `group`, rows of like length share a batch. Which lengths come when is shuffled all the same: a run whose
    last steps see only short answers ends up answering shortly (transformers' own length sampler has its 50 batches
    sorted by falling length). The first epoch alone begins with the batch that takes most memory, so that one that
    does not fit is known at once and not in the night.

    Args:
        lengths: tokens of each row (of each pack, for packs).
        batch_size: rows of a batch.
        seed, epoch: together they decide the order; no generator of torch, numpy or random is read or moved.
        group: batches of like length.
    """
    if batch_size < 1:
        raise LoraError(f"batch_size is {batch_size}; it must be at least 1")
    generator = random.Random(f"{seed} {epoch}")  # a string is hashed whole, so that no two pairs share an order
    rows = list(range(len(lengths)))
    generator.shuffle(rows)
    if not group:
        return _cut(rows, batch_size)
    steps = []
    for chunk in _cut(rows, _CHUNK * batch_size):
        steps += _cut(sorted(chunk, key=lambda row: lengths[row]), batch_size)
    generator.shuffle(steps)
    if epoch == 0 and steps:
        largest = max(range(len(steps)), key=lambda step: len(steps[step]) * max(lengths[row] for row in steps[step]))
        steps.insert(0, steps.pop(largest))
    return steps


def _cut(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
