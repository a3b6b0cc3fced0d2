import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora import LoraError
from lora.data.packs import fill, packed


@given(st.integers(1, 40).flatmap(lambda most: st.tuples(st.lists(st.integers(1, most), max_size=60), st.just(most))))
def test_each_row_lies_in_one_pack_and_no_pack_is_over_full(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = packed(lengths, capacity)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert all(pack and sum(lengths[row] for row in pack) <= capacity for pack in packs)
    assert packed(lengths, capacity) == packs
    # No more packs than first fit needs at worst: all but one are over half full.
    assert sum(2 * sum(lengths[row] for row in pack) <= capacity for pack in packs) <= 1
    assert 0 <= fill(lengths, packs, capacity) <= 1


@pytest.mark.parametrize(
    ("lengths", "packs"),
    [
        ([], []),
        ([8], [[0]]),
        ([8, 8], [[0], [1]]),  # as long as a pack
        ([1] * 8, [list(range(8))]),
        ([3, 5, 4, 4], [[0, 1], [2, 3]]),
        ([4, 3, 5, 2, 2], [[1, 2], [0, 3, 4]]),
    ],
)
def test_packs_by_hand(lengths: list[int], packs: list[list[int]]) -> None:
    assert packed(lengths, 8) == packs


def test_the_share_that_is_filled() -> None:
    assert fill([3, 5, 4], [[0, 1], [2]], 8) == 12 / 16
    assert fill([], [], 8) == 1


@pytest.mark.parametrize("length", [0, 9])
def test_a_row_that_fits_no_pack_is_named(length: int) -> None:
    with pytest.raises(LoraError, match=f"row 2 has {length} tokens, and a pack takes 1 to 8"):
        packed([8, length], 8)


def test_many_rows_are_packed_in_little_time_and_space() -> None:
    lengths = [1 + row * row % 509 for row in range(200_000)]
    start = time.process_time()
    packs = packed(lengths, 2048)
    assert time.process_time() - start < 5  # it takes 0.3 s; a search through all packs takes minutes
    assert fill(lengths, packs, 2048) > 0.99
