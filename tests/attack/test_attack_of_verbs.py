"""An interrupt at any line of any verb: the model is as before it or as after it, to the bit.

Here a few steps of each verb; every step of all by `pytest -m attack`, and as a table by attack_of_verbs.py.
"""

from pathlib import Path

import pytest
import torch

import lora
from attack_of_verbs import ERRORS, Attack, Report, attack
from cases_of_verbs import Case, cases
from interrupt import Interrupt, raising

pytest.importorskip("bitsandbytes")
CASES = cases()


def proved(report: Report) -> None:
    assert report.steps > 0
    assert not report.wrong, [(found.place, found.verdict, found.differs, found.lost) for found in report.wrong[:3]]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_interrupted_merge_and_every_other_verb_is_before_or_after(case: Case) -> None:
    proved(attack(case, "KeyboardInterrupt", few=12 if case.model == "linear" else 3, first=7))


@pytest.mark.attack
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_every_step_of_every_verb(case: Case, error: str) -> None:
    proved(attack(case, error))


@pytest.mark.attack
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("again", [1, 2, 3, 5, 8, 13, 21, 34])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_a_second_interrupt_inside_the_clean_up(case: Case, again: int) -> None:
    proved(attack(case, again=again, every=3))


def the(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_the_attack_sees_a_verb_that_stops_between() -> None:
    def two_verbs(subject: object) -> None:
        lora.activate(subject.model, "a")  # type: ignore[attr-defined]
        lora.activate(subject.model, None)  # type: ignore[attr-defined]

    report = attack(Case("linear", "planted", "two", two_verbs), every=40)
    assert report.counts["between"] > 0 and report.counts["before"] > 0
    assert len(report.wrong) >= report.counts["between"]
    assert any("host 0" in found.differs for found in report.wrong)


def test_the_attack_sees_a_base_that_does_not_come_back(tmp_path: Path) -> None:
    case = the("linear-remove_last")
    attacker = Attack(case, tmp_path)
    subject = case.build(tmp_path)
    subject.model[0].weight.data[0, 0] += 1e-7
    assert "tensor 0.weight" in attacker.lost(subject)


def test_an_interrupt_comes_at_each_step_and_a_second_one_after_it() -> None:
    case, places = the("linear-activate"), set()
    for n in range(1, 40):
        interrupt = Interrupt(n, raising(MemoryError))
        assert isinstance(interrupt.run(case.build(Path()).verb), MemoryError)
        places.update(interrupt.places)
    assert {place.rpartition(" ")[0] for place in places if place.startswith("activation.py")}
    merge = the("linear-merge_refused")
    steps = Interrupt(0, raising(MemoryError))
    steps.run(merge.build(Path()).verb)
    twice = Interrupt(steps.steps // 2, raising(KeyboardInterrupt), again=5)
    assert isinstance(twice.run(merge.build(Path()).verb), KeyboardInterrupt)
    assert len(twice.places) in (1, 2)


@pytest.mark.parametrize(
    "case", [the("linear-merge"), the("tied-inject"), the("nf4-merge_unload")], ids=lambda case: case.name
)
def test_a_case_is_built_the_same_each_time(case: Case, tmp_path: Path) -> None:
    first, second = (Attack(case, tmp_path) for _ in range(2))
    assert (first.before, first.after, first.base) == (second.before, second.after, second.base)
    assert torch.is_grad_enabled()
