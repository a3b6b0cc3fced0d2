"""Two threads and one model: a forward pass within `lora.steady()` reads one set of adapters whole; verbs follow one
another.

No test waits for luck: one thread is stopped at a step, and the other runs meanwhile. play_threads.py prints the
counts of races beside.
"""

import pytest

from play_threads import LAYERS, PAIRS, SWAPS, at_each_step, chain, two_forwards, verb_and_forward, verb_and_verb
from play_threads import within_one_forward as within


@pytest.mark.parametrize("name", SWAPS)
def test_threads_one_forward_reads_one_set_of_adapters_while_a_verb_runs(name: str) -> None:
    assert within(name, LAYERS // 2) == "whole"


@pytest.mark.parametrize("name", SWAPS)
def test_threads_a_forward_amid_a_verb_is_before_or_after(name: str) -> None:
    counts = verb_and_forward(name, verb_first=True, every=97)
    assert set(counts) == {"whole"}, counts


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_threads_two_verbs_leave_one_state_and_the_base_whole(one: str, other: str) -> None:
    counts = verb_and_verb(one, other, every=211)
    assert set(counts) == {"whole"}, counts


def test_threads_two_forwards_of_grouped_linears_have_their_own_outputs_and_keep_the_group() -> None:
    counts = two_forwards(every=29)
    assert set(counts) == {"right"}, counts


@pytest.mark.attack
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb_first", [True, False])
@pytest.mark.parametrize("name", SWAPS)
def test_a_verb_and_a_forward_at_each_step(name: str, verb_first: bool) -> None:
    counts = verb_and_forward(name, verb_first)
    assert set(counts) == {"whole"}, counts


@pytest.mark.attack
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_verb_at_each_step_of_a_verb(one: str, other: str) -> None:
    counts = verb_and_verb(one, other)
    assert set(counts) == {"whole"}, counts


@pytest.mark.attack
@pytest.mark.timeout(3600)
def test_a_forward_at_each_step_of_a_forward() -> None:
    counts = two_forwards()
    assert set(counts) == {"right"}, counts


def test_the_second_thread_runs_at_each_step_of_the_first() -> None:
    ran: list[int] = []
    counts = at_each_step(SWAPS["activate"].ways[0], lambda m: ran.append(1), chain, lambda m, p: p.place, every=50)
    assert sum(counts.values()) == len(ran) > 10
    assert len(counts) > 5
