"""Regular expressions out of a stranger's file, of which some would take longer than the universe. Needs no torch."""

import re
from collections.abc import Iterable, Sequence
from math import comb, inf
from typing import Any

try:
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as _parser

LONGEST = 20_000  # of one pattern, in characters
MOST = 200_000  # of all patterns of a file
STEPS = 10**8  # a second's work, or two
OPTIONS = 16  # how often a repetition of something ambiguous may be written out


def steps(pattern: str, length: int) -> float:
    """At most how many ways Python's matcher tries on a text of this length; infinite where they are not bounded so.

    It goes back and tries the next way at every choice, so the ways of a sequence multiply. `k` repetitions of one
    thing in a sequence can share the text out in comb(length + k, k) ways. A repetition of something that has choices
    itself is exponential.

    Raises:
        ValueError: it is no regular expression.
    """
    try:
        re.compile(pattern)  # as the parser below, and more
        repeats, ways = _ways(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"no regular expression ({type(error).__name__}: {error})") from None
    return ways * comb(length + repeats, repeats) if repeats < 100 and ways < inf else inf


def _ways(sequence: Iterable[tuple[Any, Any]]) -> tuple[int, float]:
    """(repetitions of one thing, the ways through everything else)"""
    repeats, ways = 0, 1.0
    for code, value in sequence:
        inner, factor = _ways_of(str(code), value)
        repeats, ways = repeats + inner, ways * factor
    return repeats, ways


def _ways_of(code: str, value: Any) -> tuple[int, float]:
    if code in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        low, high, body = value
        repeats, ways = _ways(body)
        if (repeats, ways) == (0, 1):
            return int(low != high), 1
        return (repeats * high, (ways + (low != high)) ** high) if high <= OPTIONS else (0, inf)
    if code == "BRANCH":
        found = [_ways(branch) for branch in value[1]]
        return max(repeats for repeats, _ in found), sum(ways for _, ways in found)
    if code == "GROUPREF_EXISTS":
        found = [_ways(branch or ()) for branch in value[1:]]
        return max(repeats for repeats, _ in found), sum(ways for _, ways in found)
    if code in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):
        return _ways(value[-1] if isinstance(value, tuple) else value)
    return 0, 1


def affordable(patterns: Sequence[str], names: Sequence[str], ends: bool = False) -> bool:
    """Whether all of these may be matched with each of these names, or with all that a name ends in (`ends`)."""
    length = max(map(len, names), default=0)
    starts = max((name.count(".") + 1 for name in names), default=0) if ends else 1
    return sum(length + starts * steps(pattern, length) for pattern in patterns) * len(names) <= STEPS
