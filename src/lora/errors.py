"""The one error root and the one warning category; both say what to do next."""

from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches


class LoraError(ValueError):
    """Something the caller can put right: which argument, what it got, what is allowed, what to do."""


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
