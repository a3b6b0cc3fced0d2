"""A recipe's text into plain values, whatever stands in the file: bounded in size, depth and time.

YAML is read as its version 1.2 has it: 1e-4 is a number, and `no` a word. PyYAML parses; what its loaders would make of
the text (timestamps, base-60 numbers, objects, copies by alias) is not wanted here.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import LoraError

_BYTES = 1 << 18  # the longest file; FinLoRA's 39 runs take 13 KB
_DEPTH = 16
_DIGITS = 400  # the longest number; Python itself stops at 4,300
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False, ".inf": math.inf, "-.inf": -math.inf}
_WORDS |= {".nan": math.nan}
_INTEGER, _NUMBER = re.compile(r"[-+]?\d+"), re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def read_mapping(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping in a YAML or JSON file. `what` is what messages call the file.

    Raises:
        LoraError: nothing readable is there, it is too long or too deep, no YAML or JSON, or no mapping.
    """
    text = _read_text(path, what)
    try:
        # JSON indented with tabs is not YAML, so each suffix gets its own parser.
        content = read_json(text) if path.suffix == ".json" else read_yaml(text)
    except LoraError as error:
        raise LoraError(f"{what} {str(path)!r} is not valid YAML or JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoraError(f"{what} {str(path)!r} holds {type(content).__name__}; it must be a mapping of field: value")
    return content


def _read_text(path: Path, what: str) -> str:
    try:
        if path.is_dir():
            inside = " (such as the recipe.yaml in it)" if (path / "recipe.yaml").is_file() else ""
            raise LoraError(f"{what}: {str(path)!r} is a folder; give a YAML or JSON file{inside}")
        if not path.is_file():
            raise LoraError(f"{what}: there is no file {str(path)!r}; give a YAML or JSON file, or flags alone")
        if path.stat().st_size > _BYTES:
            raise LoraError(f"{what} {str(path)!r} has {path.stat().st_size:,} bytes; at most {_BYTES:,} are read")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoraError(f"{what} {str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise LoraError(f"{what} {str(path)!r} cannot be read: {error.strerror}") from error


def read_json(text: str) -> Any:
    """JSON's value. Raises `LoraError` for what is none, a key given twice, or more than can be meant."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key, value in items:
            if key in mapping:
                raise LoraError(f"key {key[:80]!r} is given twice")
            mapping[key] = value
        return mapping

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_int=_integer)
    except RecursionError as error:
        raise LoraError("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise LoraError(str(error)) from error
    _check_depth(value)
    return value


def read_yaml(text: str) -> Any:
    """YAML's value. Raises `LoraError` for what is none, a key given twice, an anchor, a tag, or too much depth."""
    import yaml

    events = yaml.parse(text, Loader=yaml.SafeLoader)
    try:
        next(events)  # the stream's start
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        value = _value(events, next(events), 0)
        next(events)  # the document's end
        if not isinstance(next(events), yaml.StreamEndEvent):
            raise LoraError("it holds several documents (---); give one")
    except yaml.MarkedYAMLError as error:
        raise LoraError(_told(error)) from error
    except yaml.YAMLError as error:  # the reader's, for characters that no YAML may hold
        raise LoraError(str(error).splitlines()[0]) from error
    return value


def _told(error: Any) -> str:
    mark = error.problem_mark or error.context_mark
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"{' '.join(filter(None, (error.context, error.problem)))}{where}"[:300]


def _value(events: Iterator[Any], event: Any, depth: int) -> Any:
    """The value that starts with this event; takes the events up to its end."""
    import yaml

    line = f"line {event.start_mark.line + 1}"
    if depth > _DEPTH:
        raise LoraError(f"{line}: it is nested more than {_DEPTH} deep")
    if getattr(event, "anchor", None) is not None:  # an alias has one too
        raise LoraError(f"{line}: a recipe takes no anchors and aliases (&, *, <<); write the value out")
    if event.tag is not None:
        raise LoraError(f"{line}: a recipe takes no tags, and there is {event.tag[:80]!r}")
    if isinstance(event, yaml.ScalarEvent):
        return scalar(event.value) if event.style is None else str(event.value)
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_value(events, event, depth + 1))
        return items
    mapping: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        line = f"line {event.start_mark.line + 1}"
        if not isinstance(event, yaml.ScalarEvent):
            raise LoraError(f"{line}: a key must be a word")
        if event.value == "<<" and event.style is None:
            raise LoraError(f"{line}: a recipe takes no merged mappings (<<); write their fields out")
        if event.value in mapping:
            raise LoraError(f"key {event.value[:80]!r} is given twice ({line})")
        mapping[event.value] = _value(events, next(events), depth + 1)
    return mapping


def scalar(text: str) -> Any:
    """What a bare word of YAML means: nothing, true or false, a number, or itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return _integer(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise LoraError(f"it holds a number of {len(text):,} digits; at most {_DIGITS} are read")
    return int(text)


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > _DEPTH:
        raise LoraError(f"it is nested more than {_DEPTH} deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, depth + 1)


def to_yaml(fields: dict[str, Any]) -> str:
    """YAML that `read_yaml` reads back to the same values."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what YAML's versions differ on."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        style = '"' if scalar(value) is not value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(fields, Dumper=Dumper, sort_keys=False, allow_unicode=True)
