"""Markdown whose parts can hold any text: what a model answers, what a file is called."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

# What has a meaning in Markdown or HTML, within a line or a table; as a character's number it has none.
_MEANS = re.compile(r"[\\`*\[\]<>#|~$&@]|(?<!\w)_|_(?!\w)|:(?=//)")
# What no page can show or store: controls, halves of a pair of UTF-16, and what turns the direction of a line.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_MOST = 200


def cell(value: object, most: int = _MOST) -> str:
    """Any text as one that stands in a line or a cell as it is; more than `most` characters are cut."""
    text = str(value).replace("\r\n", "\n").strip()
    text = text if len(text) <= most else text[:most].rstrip() + " ..."
    text = _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r", "\n").replace("\t", " "))
    text = _MEANS.sub(lambda found: f"&#{ord(found[0])};", text)
    return "<br>".join(re.split("[\n\u2028\u2029]", text))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are escaped already; a line break in front, as it needs one."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(each)} |" for each in lines)


def block(language: str, code: str) -> str:
    """A block of code, whose fence is longer than any within."""
    code = "".join(each if each == "\n" else _UNSEEN.sub("?", each) for each in code)
    fence = "`" * max([2, *(len(run) for run in re.findall("`+", code))]) + "`"
    return f"{fence}{language}\n{code}\n{fence}"


def number(value: Any, digits: int = 4) -> str:
    """A number as people read it; a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return cell(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
