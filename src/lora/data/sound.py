"""Whether a row can be used at all, whatever its format: named fields, text that is Unicode, nesting with an end."""

import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import DataError

Row = dict[str, Any]
# Deeper than any row that means something, and shallow enough for each library on the way (templates, JSON, repr).
DEEPEST = 64
_TOLD = 5  # rows that an error names, each with what is wrong with it

_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxstring, _short.maxother, _short.maxlong = 3, 6, 6, 60, 60, 40


class Broken(NamedTuple):
    """What could not be parsed, in the place of its row: whoever reads all rows tells of all such.

    at: where it stands in its file, such as `line 3` or `row 2`.
    """

    at: str
    why: str


def all_told(faults: Sequence[str], what: str = "cannot be read") -> str:
    """One fault as it is; of several the first few, a line each, under what they have in common."""
    if len(faults) == 1:
        return faults[0]
    more = f"\n  - and {len(faults) - _TOLD:,} more" if len(faults) > _TOLD else ""
    return f"{len(faults):,} rows {what}; correct or remove them\n  - " + "\n  - ".join(faults[:_TOLD]) + more


class Placed(Row):
    """A row that knows where it stood, so that an error can name it wherever the rows were split or shuffled."""

    __slots__ = ("file", "number")

    def __init__(self, fields: Row, number: int, file: str = "") -> None:
        super().__init__(fields)
        self.number = number  # from 1, in its file
        self.file = file  # its name, where a source has several


def place(row: Row, number: int) -> str:
    """`7`, or `7 of b.jsonl`; a row that was not read from a file is known by `number` alone."""
    if not isinstance(row, Placed):
        return str(number)
    return f"{row.number} of {row.file}" if row.file else str(row.number)


def named_rows(places: Sequence[str], most: int = 20) -> str:
    """`row 3`, `rows 1, 2 and 40 more`"""
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return f"row{'s' if len(places) > 1 else ''} {', '.join(places[:most])}{more}"


def shown(value: Any, width: int = 80) -> str:
    """A value for an error message: short, and safe for one of any depth and size."""
    text = _short.repr(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= width else text[: width - 3] + "..."


def checked(row: Any) -> Row:
    """The row, when it has named fields whose texts and depth any tokenizer and template can take.

    Raises:
        DataError: it is no mapping, nests deeper than `DEEPEST`, or a text holds half a character (a lone surrogate).
    """
    if not isinstance(row, dict):
        raise DataError(f"is {type(row).__name__} ({shown(row)}); every row must be an object with named fields")
    level: list[tuple[str, Any]] = [(str(name), value) for name, value in row.items()]
    for name, _ in level:
        _check_text("name", name)
    for _ in range(DEEPEST):
        inner: list[tuple[str, Any]] = []
        for name, value in level:
            if isinstance(value, str):
                _check_text(name, value)
            elif isinstance(value, dict):
                for key, part in value.items():
                    _check_text("name", str(key))
                    inner.append((name, part))
            elif isinstance(value, (list, tuple)):
                inner += [(name, part) for part in value]
        if not inner:
            return row
        level = inner
    raise DataError(f"{level[0][0]} is nested more than {DEEPEST} levels deep; flatten it, or store it as text")


def _check_text(name: str, text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        name = name.encode("ascii", "backslashreplace").decode()[:60]
        raise DataError(
            f"{name} holds half a character, the lone surrogate \\u{ord(text[error.start]):04x} at position "
            f"{error.start}, which is no text; write the whole character or take it out"
        ) from error
