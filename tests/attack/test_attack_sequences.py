"""Random verbs in any order, training steps, dropout and quantized bases among them: outputs and gradients are those of
plain float64 matrices, and the base comes back to the bit."""

from pathlib import Path

import pytest

from play_sequences import BASES, Player, play

pytest.importorskip("bitsandbytes")


def test_thirty_random_verbs_are_the_formula_on_every_base() -> None:
    verbs, bases = set(), set()
    for seed in range(10):
        player = play(seed)
        bases.add(player.base)
        verbs |= {entry.partition(" ")[0] for entry in player.log[1:]}
    assert bases == set(BASES)
    assert verbs == {"inject", "train", "activate", "merge", "unmerge", "remove", "save", "load", "enter", "leave"}


@pytest.mark.attack
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(0, 2000, 100))
def test_two_thousand_sequences_of_thirty_verbs(first: int) -> None:
    for seed in range(first, first + 100):
        play(seed)


def test_the_oracle_sees_a_wrong_value(tmp_path: Path) -> None:
    player = Player(2, tmp_path)
    while not player.active or player.merged or not player.book[player.active[0]].trains:
        player.play()
    player.check()
    mine, _ = player.leaves()[1]
    mine.data[0] *= 1.01
    with pytest.raises(AssertionError, match="off by"):
        player.check()
