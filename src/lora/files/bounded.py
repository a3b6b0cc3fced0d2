"""Text out of a stranger's file: JSON within bounds, and values cut to what a message can hold. Needs no torch."""

import json
import math
import re
from typing import Any

DEEP, DIGITS, VALUES = 32, 40, 500_000
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # what could move a terminal's cursor


def parse(raw: bytes, values: int = VALUES, finite: bool = True) -> Any:
    """The value of a JSON text in UTF-8, in bounded time and memory.

    Args:
        values: how many values it may hold.
        finite: whether NaN and infinities are refused.

    Raises:
        ValueError: it is no JSON, has a key twice, text that is no Unicode, a number that is not finite or an integer
            of more than 40 digits, or is nested deeper than 32 levels.
    """
    if sum(map(raw.count, (b",", b"[", b"{"))) > values:
        raise ValueError(f"it holds more than {values:,} values")

    def number(text: str) -> float:
        if finite and not math.isfinite(float(text)):
            raise ValueError(f"{clip(text)} is not a finite number")
        return float(text)

    try:
        found = json.loads(
            raw.decode("utf-8"), parse_int=_integer, parse_float=number, parse_constant=number, object_pairs_hook=_once
        )
    except RecursionError:
        found = None
    level, depth = [found], 0
    while level and depth < DEEP:
        depth += 1
        level = [inner for value in level for inner in _inside(value)]
    if level or found is None:
        raise ValueError(f"it is null, or nested deeper than {DEEP} levels")
    return found


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {clip(next(key for key in found if keys.count(key) > 1))!r} comes twice")
    return found


def _inside(value: Any) -> list[Any]:
    if isinstance(value, str) and not value.isascii():
        value.encode("utf-8")  # half of a surrogate pair is no text, and cannot be printed
    return [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []


def clip(value: object, limit: int = 80) -> str:
    """A value as text of one line for a message."""
    text = str(value)
    return _UNSEEN.sub("?", text if len(text) <= limit else text[:limit] + "...")


def clip_lines(text: object) -> str:
    """A message of several lines about values that can be of any length."""
    lines = str(text).split("\n")
    return "\n".join([clip(line, 300) for line in lines[:5]] + ["..."] * (len(lines) > 5))
