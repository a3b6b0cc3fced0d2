"""Plain-text tables for people. Needs no torch."""

import re
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, columns aligned; those whose every entry starts with a digit to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [bool(rows) and all(re.match(r"[-\d]", row[i]) for row in rows) for i in range(len(header))]
    shown = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([shown[0], "-" * (sum(widths) + 2 * len(widths) - 2), *shown[1:]])


def size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def starred(name: str) -> str:
    """A module's name with its layer numbers as `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
