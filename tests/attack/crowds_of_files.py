"""Many processes on one folder: loads against saves, and several writers."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lora
from lora.files.description import describe
from saves_under_attack import adapted, base, forked, leftovers, outcome, read_by_us


@dataclass
class Crowd:
    """Loads by what they found, inspections by theirs, saves by their outcome, and what the folder is afterwards."""

    loads: Counter[str] = field(default_factory=Counter)
    inspections: Counter[str] = field(default_factory=Counter)
    saves: Counter[str] = field(default_factory=Counter)
    afterwards: str = ""
    left: int = 0
    examples: Counter[str] = field(default_factory=Counter)

    def faults(self) -> dict[str, int]:
        return {
            "wrong": self.loads["torn"], "falsely damaged": self.loads["refused"] + self.inspections["refused"],
            "foreign": self.loads["foreign"] + self.inspections["foreign"] + self.saves["foreign"],
            "saves refused": self.saves["refused"], "left over": self.left,
            "not whole afterwards": int(not self.afterwards.isdigit()),
        }  # fmt: skip

    def add(self, which: Counter[str], said: str) -> None:
        kind = said.partition(":")[0]
        which["whole" if kind.isdigit() else kind] += 1
        if kind in ("refused", "foreign", "torn"):
            self.examples[said[:200]] += 1


def _inspected(folder: Path) -> str:
    """ "saved" in `outcome` is: it was read."""

    def look() -> None:
        found = describe(folder)
        if found.damaged:
            raise lora.LoraError(f"damaged: {str(found)[:100]}")

    return outcome(look).replace("saved", "1")


def _write(folder: Path, states: list[int], stop: Callable[[int], bool]) -> list[str]:
    """Save the states in turn until `stop(number of saves)`."""
    models, said = [adapted(state) for state in states], []
    while not stop(len(said)):
        model = models[len(said) % len(models)]
        said.append(outcome(lambda model=model: lora.save(model, folder)))
    return said


def _together(works: list[Callable[[], Any]]) -> list[Any]:
    """What works return that run in processes of their own at the same time."""
    results: list[Any] = []

    def nest(left: list[Callable[[], Any]]) -> None:
        if left:
            _, found = forked(left[0], lambda *_: nest(left[1:]))
            results.append(found)

    nest(works)
    return results


def loads_against_saves(place: Path, loads: int, readers: int = 2, seconds: float = 3600) -> Crowd:
    """`loads` loads in several processes while another saves two adapters in turn; every tenth load an inspection."""
    found, folder, over = Crowd(), place / "crowd", place / "over"
    lora.save(adapted(1), folder)
    deadline = time.monotonic() + seconds

    def write() -> list[str]:
        return _write(folder, [2, 1], lambda _: over.exists() or time.monotonic() > deadline)

    def read() -> list[list[str]]:
        model, said = base(), []
        while len(said) < loads // readers and time.monotonic() < deadline:
            seen = read_by_us(folder, model)
            said.append([seen, _inspected(folder) if len(said) % 10 == 0 else ""])
            if seen.startswith("foreign"):
                model = base()
        over.with_name(f"over-{os.getpid()}").touch()
        if len(list(place.glob("over-*"))) == readers:
            over.touch()
        return said

    for path in place.glob("over*"):
        path.unlink()
    saves, *seen = _together([write, *[read] * readers])[::-1]
    for name, said in [("save", each) for each in saves] + [("load", each) for part in seen for each in part]:
        if name == "save":
            found.add(found.saves, "1" if said == "saved" else said)
        else:
            found.add(found.loads, said[0])
            if said[1]:
                found.add(found.inspections, said[1])
    found.afterwards, found.left = read_by_us(folder), len(leftovers(folder))
    return found


def several_writers(place: Path, writers: int, saves: int) -> Crowd:
    """Writers of one adapter each save it over and over into one folder at once; then it is one of them, whole."""
    found, folder = Crowd(), place / "writers"
    work = [lambda state=state: _write(folder, [state], lambda done: done >= saves) for state in range(1, writers + 1)]
    for said in _together(work):
        for each in said:
            found.add(found.saves, "1" if each == "saved" else each)
    found.afterwards, found.left = read_by_us(folder), len(leftovers(folder))
    return found


def killed_writers(place: Path, writers: int, seconds: float) -> Crowd:
    """As `several_writers`, and all of them are killed in the middle; the next save finds a folder that it can use."""
    found, folder = Crowd(), place / "killed-writers"
    lora.save(adapted(1), folder)

    def kill(pid: int, left: list[int]) -> None:
        if left:
            forked(lambda: _write(folder, [left[0]], lambda _: False), lambda other, _: kill(other, left[1:]))
        else:
            time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)

    states = list(range(1, writers + 1))
    forked(lambda: _write(folder, [states[0]], lambda _: False), lambda pid, _: kill(pid, states[1:]))
    found.add(found.loads, read_by_us(folder))
    found.add(found.saves, "1" if outcome(lambda: lora.save(adapted(4), folder)) == "saved" else "refused")
    found.afterwards, found.left = read_by_us(folder), len(leftovers(folder))
    return found
