"""Interrupts a verb at each of its steps, tells what became of the model, and prints a table of it.

`python tests/attack/attack_of_verbs.py --help`, with src and tests on PYTHONPATH.
"""

import argparse
import logging
import re
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

import lora
from cases_of_verbs import Case, Subject, cases
from full_state import Labels, State, difference, full_state, numbers
from interrupt import NN, SOURCE, Failure, Interrupt, raising
from lora.layers import hosts

ERRORS: dict[str, type[BaseException]] = {
    "KeyboardInterrupt": KeyboardInterrupt,
    "MemoryError": MemoryError,
    "Failure": Failure,
}


@dataclass
class Found:
    """A step at which the model was neither before nor after. lost: the base did not come back by `remove` either."""

    place: str
    way: str
    verdict: str
    differs: list[str]
    lost: list[str]


@dataclass
class Report:
    """What became of one case. rng: refusals after which the random numbers had moved on."""

    case: Case
    error: str
    steps: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    rng: int = 0
    swallowed: int = 0
    wrong: list[Found] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return sum(bool(found.lost) for found in self.wrong)


class Attack:
    """One case, whose states before and after are known."""

    def __init__(self, case: Case, home: Path) -> None:
        self.case, self.home = case, home
        subject, labels = self._fresh()
        self.before = self._state(subject, labels)
        silent = Interrupt(0, raising(Failure))
        self.fails = silent.run(subject.verb) is not None  # it raises by itself
        self.steps = silent.steps
        self.visits = silent.visits
        assert self.fails == case.verb.endswith("refused"), case.name
        self.after = self.before if self.fails else self._state(subject, labels)
        raw = Case(case.model, "raw", "raw", case.call).build(home)
        self.base = full_state(raw.model, Labels(raw.model), raw.run)

    def _fresh(self) -> tuple[Subject, Labels]:
        folder = Path(tempfile.mkdtemp(dir=self.home))
        subject = self.case.build(folder)
        return subject, Labels(subject.model)

    def _state(self, subject: Subject, labels: Labels) -> State:
        return full_state(subject.model, labels, subject.run, subject.folder)

    def at(self, n: int, error: type[BaseException], report: Report, again: int, within: tuple[str, ...]) -> bool:
        """Interrupt at step n; False where the verb has no so many."""
        subject, labels = self._fresh()
        random = numbers()
        interrupt = Interrupt(n, raising(error), again, within)
        raised = interrupt.run(subject.verb)
        if not interrupt.places:
            return False
        moved = numbers() != random
        state = self._state(subject, labels)
        verdict = "before" if self.is_before(state) else "after" if state == self.after else "between"
        report.steps += 1
        report.counts[verdict] += 1
        report.rng += verdict == "before" and moved
        allowed = ("before", "after") if again else self.case.allowed  # of two, one may come before any clean-up
        if raised is None:  # the library expects this exception there, and goes on
            report.swallowed += 1
            allowed = ("after",)
        lost = self.lost(subject)
        if verdict not in allowed or lost:
            near = min(difference(state, self.before), difference(state, self.after), key=len)
            report.wrong.append(Found(interrupt.places[-1], interrupt.ways[-1], verdict, near, lost))
        return True

    def is_before(self, state: State) -> bool:
        """A save merges a merged model again, by which a quantized linear may have another parameter of the same bits,
        whether or not the files were written."""
        unsaved = {**self.after, "files": self.before["files"]} if self.case.verb == "save_merged" else self.before
        return state in (self.before, unsaved)

    def lost(self, subject: Subject) -> list[str]:
        """What of the base does not come back once every adapter is removed, by the verb that a user has for it."""
        gone = self.case.verb == "merge_unload" and not list(hosts(subject.model))
        if gone or self.case.model == "words16":
            return []  # there is no way back from these, once done
        try:
            if list(hosts(subject.model)):
                lora.remove(subject.model)
        except Exception as error:
            return [f"remove raises {type(error).__name__}: {str(error)[:80]}"]
        return difference(
            unlabeled(full_state(subject.model, Labels(subject.model), subject.run)), unlabeled(self.base)
        )


def unlabeled(state: State) -> State:
    """Without the summary, which a plain model has none of, and the files."""
    return {key: value for key, value in state.items() if key not in ("summary", "files")}


def attack(
    case: Case, error: str = "KeyboardInterrupt", every: int = 1, first: int = 1, again: int = 0, deep: bool = False,
    few: int = 0, lines: bool = False,
) -> Report:  # fmt: skip
    """Interrupt a case at steps `first`, `first + every`, ... until it completes.

    few: at about so many steps, spread over the verb, whatever `every` says.
    lines: at the first and the last visit of each line, call and return, whatever `every` says.
    again: interrupt once more, so many steps later: inside the clean-up.
    deep: count torch's own lines in torch.nn.modules as well.
    """
    report = Report(case, error)
    within = (SOURCE, NN) if deep else (SOURCE,)
    with tempfile.TemporaryDirectory() as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attacker = Attack(case, Path(home))
        if lines:
            for n in sorted({step for visits in attacker.visits.values() for step in visits}):
                attacker.at(n, ERRORS[error], report, again, within)
            return report
        every = max(1, attacker.steps // few) if few else every
        n = min(first, every)
        while attacker.at(n, ERRORS[error], report, again, within):
            n += every
    return report


def line(report: Report) -> str:
    c = report.counts
    return (
        f"| {report.case.name:34} | {report.error:17} | {report.steps:5} | {c['before']:6} | {c['after']:5} "
        f"| {c['between']:7} | {len(report.wrong):5} | {report.lost:4} | {report.rng:3} | {report.swallowed:4} |"
    )


HEAD = (
    f"| {'model-verb':34} | {'exception':17} | steps | before | after | between | wrong | lost | rng | kept |\n"
    f"|{'-' * 36}|{'-' * 19}|------:|-------:|------:|--------:|------:|-----:|----:|-----:|"
)


def _causes(reports: list[Report]) -> str:
    """The wrong steps by the lines of the verb that led there, with an example, the cases, and what differed."""
    grouped: dict[str, list[tuple[Report, Found]]] = {}
    for report in reports:
        for found in report.wrong:
            grouped.setdefault(found.way, []).append((report, found))
    rows = []
    for way, all_found in sorted(grouped.items()):
        differs = Counter(key.split(" ")[0] for _, found in all_found for key in found.differs)
        lost = Counter(key.split(" of ")[0].split(" ")[0] for _, found in all_found for key in found.lost)
        where = Counter(f"{report.case.name}={found.verdict}" for report, found in all_found)
        rows.append(f"{way}: {len(all_found)} steps, such as {all_found[0][1].place}")
        rows.append(f"    differs: {', '.join(differs)}; lost: {', '.join(lost) or 'nothing'}")
        rows.append(f"    {', '.join(f'{name} {n}' for name, n in where.items())}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=".", help="a pattern that the case's name has")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--again", type=int, default=0)
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--lines", action="store_true", help="the first and the last visit of each line alone")
    parser.add_argument("--errors", nargs="*", default=list(ERRORS), choices=list(ERRORS))
    parser.add_argument("--causes", action="store_true", help="also list the wrong steps by their place")
    got = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # bitsandbytes remarks on each of its casts
    chosen = [case for case in cases() if re.search(got.only, case.name)]
    print(HEAD, flush=True)
    reports = []
    for error in got.errors:
        for case in chosen:
            reports.append(attack(case, error, got.every, got.first, got.again, got.deep, lines=got.lines))
            print(line(reports[-1]), flush=True)
    totals = sum((report.counts for report in reports), Counter())
    print(
        f"{sum(r.steps for r in reports)} steps, {dict(totals)}, {sum(len(r.wrong) for r in reports)} wrong, "
        f"{sum(r.lost for r in reports)} lost"
    )
    if got.causes:
        print(_causes(reports))


if __name__ == "__main__":
    main()
