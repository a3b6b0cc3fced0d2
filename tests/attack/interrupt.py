"""An exception at the n-th step of what runs in the library: the attack on verbs."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import lora

SOURCE = str(Path(lora.__file__).parent)
NN = str(Path(torch.nn.__file__).parent / "modules")
_GENERATOR = 0x20  # co_flags


class Failure(Exception):
    """A plain exception, which no code knows."""


def raising(error: type[BaseException]) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


class Interrupt:
    """Calls `act` at step `n` of the library's code, counted from 1, and once more `again` steps after that. What it
    raises comes out of the library's line.

    A step is a line about to run, a function entered or a function about to return. A generator's own entries and
    exits are none: Python raises there inside the generator, and a trace function cannot.

    steps: how many there were. places: where it acted, as "file.py:line function"; none where it did not come to n.
    ways: from which line of the verb, and of what that called. visits: of each line, call and return the first step and
    the last.
    """

    def __init__(self, n: int, act: Callable[[], object], again: int = 0, within: tuple[str, ...] = (SOURCE,)) -> None:
        self.n, self.act, self.again, self.within = n, act, again, within
        self.steps = 0
        self.places: list[str] = []
        self.ways: list[str] = []
        self.visits: dict[tuple[object, int, str], tuple[int, int]] = {}

    def run(self, verb: Callable[[], object]) -> BaseException | None:
        """Run a verb under the attack; what it raised."""
        before, profile = sys.gettrace(), sys.getprofile()
        if self.again:
            sys.setprofile(self._profile)
        sys.settrace(self._trace)
        try:
            verb()
        except BaseException as error:
            return error
        finally:
            sys.settrace(before)
            sys.setprofile(profile)
        return None

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.within):
            return None
        self._step(frame, event)
        return self._trace

    def _step(self, frame: FrameType, event: str) -> None:
        if event == "exception" or (event in ("call", "return") and frame.f_code.co_flags & _GENERATOR):
            return
        self.steps += 1
        visited = (frame.f_code, frame.f_lineno, event)
        self.visits[visited] = (self.visits.get(visited, (self.steps, 0))[0], self.steps)
        if self.steps == self.n:
            self.places.append(_line(frame) + ("" if event == "line" else f" ({event})"))
            above: list[str] = []
            outer: FrameType | None = frame
            while outer is not None:
                above += [_line(outer)] if outer.f_code.co_filename.startswith(SOURCE) else []
                outer = outer.f_back
            self.ways.append(" > ".join(above[:-3:-1]))
            self.act()

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        """Python stops tracing once a trace function has raised; go on, to raise a second time."""
        if len(self.places) == 1 and self.again:
            self.n, self.again = self.steps + self.again, 0
            sys.settrace(self._trace)
            above: FrameType | None = frame
            while above is not None:
                if above.f_code.co_filename.startswith(self.within):
                    above.f_trace = self._trace
                above = above.f_back


def _line(frame: FrameType) -> str:
    file = frame.f_code.co_filename.removeprefix(SOURCE + "/").rpartition("site-packages/")[2]
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
