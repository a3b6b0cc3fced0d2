"""Tables in plain text."""

import re
from collections.abc import Sequence

_NUMERIC = re.compile(r"[-\d]|scalar$|$")  # how an entry of a column of numbers or sizes starts


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under a rule; those of numbers and sizes, which may have gaps, to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [bool(rows) and all(_NUMERIC.match(row[i]) for row in rows) for i in range(len(header))]
    shown = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([shown[0], "-" * (sum(widths) + 2 * len(widths) - 2), *shown[1:]])


def size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def starred(name: str) -> str:
    """A module's full name with `*` for its layer's number, so that all layers have one line."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
