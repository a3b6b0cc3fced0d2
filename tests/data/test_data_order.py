import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora import LoraError
from lora.data.order import batches

LENGTHS = [3 + row * row % 97 for row in range(1000)]


@given(
    st.lists(st.integers(1, 50), max_size=80), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3), st.booleans()
)
def test_each_row_comes_once_in_batches_of_the_size(
    lengths: list[int], size: int, seed: int, epoch: int, group: bool
) -> None:
    steps = batches(lengths, size, seed, epoch, group)
    assert sorted(row for step in steps for row in step) == list(range(len(lengths)))
    assert len(steps) == -(-len(lengths) // size)
    assert sum(len(step) < size for step in steps) <= 1
    assert all(steps)


@pytest.mark.parametrize("group", [False, True])
def test_the_order_is_a_function_of_seed_and_epoch_and_of_nothing_else(group: bool) -> None:
    before = random.getstate(), torch.get_rng_state()
    first = batches(LENGTHS, 8, 1, 2, group)
    assert (random.getstate(), torch.get_rng_state().tolist()) == (before[0], before[1].tolist())
    random.seed(5)
    torch.manual_seed(5)
    assert batches(LENGTHS, 8, 1, 2, group) == first
    others = [batches(LENGTHS, 8, seed, epoch, group) for seed, epoch in ((1, 1), (2, 2), (2, 1), (12, 2))]
    assert all(first != other for other in others) and others[0] != others[1]


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    """A run must resume at its place after Python or torch was updated."""
    assert batches([1] * 8, 3, 7, 1, group=False) == [[7, 6, 1], [5, 2, 4], [3, 0]]
    assert batches([5, 1, 9, 2, 8, 3], 2, 7, 1, group=True) == [[1, 3], [5, 0], [4, 2]]


def padding(steps: list[list[int]]) -> int:
    return sum(len(step) * max(LENGTHS[row] for row in step) for step in steps) - sum(LENGTHS)


def test_rows_of_like_length_share_a_batch() -> None:
    assert padding(batches(LENGTHS, 8, 0, 0, group=True)) < padding(batches(LENGTHS, 8, 0, 0, group=False)) / 5


def test_lengths_come_in_no_order_over_a_run() -> None:
    """transformers' length sampler falls from the longest to the shortest each 50 batches, and ends on the shortest."""
    for seed in range(5):
        means = [statistics.mean(LENGTHS[row] for row in step) for step in batches(LENGTHS, 8, seed, 1, group=True)]
        assert abs(statistics.correlation(means, range(len(means)))) < 0.3
        tail = statistics.mean(means[-25:])
        assert abs(tail - statistics.mean(means)) < 15  # of 97


def test_a_first_epoch_begins_with_the_batch_that_takes_most_memory() -> None:
    def cost(step: list[int]) -> int:
        return len(step) * max(LENGTHS[row] for row in step)

    first, *rest = batches(LENGTHS, 8, 0, 0, group=True)
    assert cost(first) >= max(map(cost, rest))
    starts = {cost(batches(LENGTHS, 8, 0, epoch, group=True)[0]) for epoch in range(1, 6)}
    assert len(starts) > 1  # and no other does


def test_a_batch_has_rows() -> None:
    with pytest.raises(LoraError, match="batch_size is 0"):
        batches(LENGTHS, 0, 0, 0, group=True)
