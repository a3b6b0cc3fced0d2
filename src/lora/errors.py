"""The one error root and the one warning category; both say what to do next.

Each class has the exit code with which the `lora` command ends on it.
"""

from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches


class LoraError(ValueError):
    """Something the caller can put right: which argument, what it got, what is allowed, what to do."""

    exit_code = 2


class DataError(LoraError):
    """Rows that are missing, cannot be read, or would teach nothing."""

    exit_code = 3


class OutOfMemoryError(LoraError):
    """A step did not fit into the memory, however small it was made."""

    exit_code = 4


class NonFiniteError(LoraError):
    """The loss or its gradient is NaN or infinite; `step` is the optimizer step that was not taken (from 1)."""

    exit_code = 5

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class CheckError(LoraError):
    """The job is done, but what it made did not pass its check."""

    exit_code = 6


class Stopped(KeyboardInterrupt):
    """A run that a signal ended; the message says what was kept. `exit_code` is the shell's: 130 for Ctrl-C."""

    def __init__(self, number: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.number = int(number)
        self.exit_code = 128 + self.number


class LoraWarning(UserWarning):
    """A choice or a loss that the caller should know of."""


def near(name: str, known: Iterable[str], count: int = 4) -> str:
    """`; near names: ...`, or the first few known ones when none is near; empty when there are none."""
    known = list(dict.fromkeys(known))
    if not known:
        return ""
    close = get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return f"; near names: {', '.join(close)}"
    more = ", ..." if len(known) > 3 * count else ""
    return f"; there is: {', '.join(known[: 3 * count])}{more}"


def listed(names: list[str]) -> str:
    """`a, b and c`"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def ends(names: Iterable[str], among: Iterable[str]) -> dict[str, int]:
    """The shortest ends of full names that pick these modules of `among` and no other, and how many each picks."""
    picked, found = dict.fromkeys(names), Counter[str]()
    kept = {name[i:] for name in among if name not in picked for i in _starts(name)}
    for name in picked:
        short = next((name[i:] for i in _starts(name) if name[i:] not in kept and not name[i].isdigit()), name)
        found[short] += 1
    return dict(found)


def _starts(name: str) -> list[int]:
    """Where the ends of a full name start, the shortest first."""
    return [i for i in reversed(range(len(name))) if i == 0 or name[i - 1] == "."]
