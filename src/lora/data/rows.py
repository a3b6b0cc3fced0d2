"""Rows of training data from files, a folder or the hub, as plain dictionaries."""

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError, LoraError, LoraWarning
from .readers import READABLE, READERS, read_file, suffix_of
from .saved import is_saved, read_saved
from .sound import Broken, Placed, Row, all_told, checked

_CONFIG = re.compile(r"(?:([^:\[]+):)?(.*)", re.DOTALL)  # a split may hold a colon in brackets: train[:100]

__all__ = ["Glance", "Row", "glance", "is_local", "read_rows"]


class Glance(NamedTuple):
    """What a cheap look tells: the rows' format by name and how many there are; None for a set on the hub."""

    format: str
    rows: int | None


def glance(source: str | Path, argument: str = "data", task: str = "generate") -> Glance:
    """Format and number of rows, without torch, transformers and datasets; every row of a file is looked at.

    A set on the hub is not asked for: its format is "known once it is loaded" and its rows are None. `task` is the
    recipe's: "classify" wants rows of a text and its label.

    Raises:
        DataError: as `read_rows`, and rows that fit no format.
    """
    from .examples import read_examples
    from .labels import labelled_format, labelled_texts

    if not is_local(source):
        return Glance("known once it is loaded", None)
    rows = read_rows(source, argument)
    if task == "classify":
        return Glance(labelled_format(rows[0]), len(labelled_texts(rows, argument)))
    return Glance(read_examples(rows, argument).format, len(rows))


def read_rows(source: str | Path, argument: str = "data") -> list[Row]:
    """Every row of a source, each knowing its place (see `sound.Placed`).

    A source is a file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet or .txt, gzipped or not), a folder of such files
    (in the order of their names), a folder that `datasets` saved (`folder` or `folder:split`), or a set on the hub
    (`name`, `name:split` or `name:config:split`). A .txt file is one row, `{"text": ...}`.

    `argument` is what the error messages call the source.

    Raises:
        DataError: no such source, an unknown suffix, a file that cannot be parsed, a row that is not a mapping, is
            nested without end or holds half a character, or no rows at all.
    """
    try:
        rows: list[Row] = []
        faults: list[str] = []
        for file, found in _read(str(source)):
            for number, row in enumerate(found, 1):
                if isinstance(row, Broken):
                    faults.append(f"{row.at} of {str(Path(source, file))!r} {row.why}")
                    continue
                try:
                    rows.append(Placed(checked(row), number, file))
                except DataError as error:
                    faults.append(f"row {number} of {str(Path(source, file))!r} {error}")
        if faults:
            raise DataError(all_told(faults))
        if not rows:
            raise DataError(f"{str(source)!r} holds no rows; give at least one")
    except LoraError as error:
        raise DataError(f"{argument}: {error}") from error
    return rows


def is_local(source: str | Path) -> bool:
    """Whether a source is, or was meant to be, on this machine; else it names a set on the hub."""
    name = str(source)
    return (
        name.startswith((".", "/", "~"))
        or "\0" in name
        or Path(name).exists()
        or _saved_split(name) is not None
        or suffix_of(Path(name)) in READERS
    )


def _saved_split(source: str) -> tuple[Path, str] | None:
    folder, colon, split = source.rpartition(":")
    return (Path(folder), split) if colon and Path(folder).is_dir() else None


def _read(source: str) -> list[tuple[str, list[Any]]]:
    """The rows of each file of the source, with its name where there are several."""
    if not is_local(source):
        return [("", _read_hub(source))]
    if "\0" in source:
        raise DataError(f"{source!r} holds a NUL character; give a path")
    path = Path(source)
    if path.is_file():
        if suffix_of(path) not in READERS:
            raise DataError(f"{source!r} ends in {path.suffix!r}; readable are {READABLE}, .gz of each, and hub names")
        return [("", read_file(path))]
    if path.is_dir():
        return [("", read_saved(path))] if is_saved(path) else _read_folder(path)
    if (split := _saved_split(source)) is not None:
        if not is_saved(split[0]):
            raise DataError(f"{str(split[0])!r} is no data set saved by `datasets`, so it has no split {split[1]!r}")
        return [("", read_saved(*split))]
    raise DataError(f"{source!r} is not there; give a file ({READABLE}), a folder of them, or a hub name")


def _read_folder(folder: Path) -> list[tuple[str, list[Any]]]:
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    files = [path for path in inside if path.is_file() and suffix_of(path) in READERS]
    others = [path.name + ("/" if path.is_dir() else "") for path in inside if path not in files]
    if not files:
        there = f"; there is: {', '.join(others[:10])}" if others else ", it is empty"
        raise DataError(f"the folder {str(folder)!r} holds no readable file ({READABLE}){there}")
    if others:
        warnings.warn(
            f"of the folder {str(folder)!r} these are read: {', '.join(path.name for path in files)}; "
            f"these are not: {', '.join(others[:10])}{' and more' if len(others) > 10 else ''}",
            LoraWarning,
            stacklevel=4,
        )
    return [(path.name, read_file(path)) for path in files]


def _read_hub(source: str) -> list[Any]:
    import datasets  # type: ignore[import-untyped]

    name, _, rest = source.partition(":")
    config, split = _CONFIG.fullmatch(rest).groups()  # type: ignore[union-attr]  # it matches any text
    try:
        return [dict(row) for row in datasets.load_dataset(name, *([config] if config else []), split=split or "train")]
    except Exception as error:  # the hub client raises a dozen unrelated classes, from HTTP to ValueError
        raise DataError(
            f"{source!r} is no file here, and loading it from the hub failed: {error}. "
            "Check the spelling, the split (name:split or name:config:split) and the network"
        ) from error
