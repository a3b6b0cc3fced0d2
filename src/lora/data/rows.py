"""Rows of training data from a file or the hub, as plain dictionaries."""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DataError, LoraError

Row = dict[str, Any]


def read_rows(source: str | Path, argument: str = "data") -> list[Row]:
    """Every row of a .jsonl, .json, .csv, .parquet or .txt file, or of a hub dataset (`name` or `name:split`).

    A .txt file is one row, `{"text": ...}`. `argument` is what the error messages call the source.

    Raises:
        DataError: no such source, an unknown suffix, a row that is not a mapping, or no rows at all.
    """
    try:
        rows = _read(source)
        if not rows:
            raise DataError(f"{str(source)!r} holds no rows; give at least one")
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise DataError(
                    f"row {number} of {str(source)!r} is {type(row).__name__}; "
                    "every row must be an object with named fields"
                )
    except LoraError as error:
        raise DataError(f"{argument}: {error}") from error
    return rows


def _read(source: str | Path) -> list[Row]:
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in _READERS:
            raise DataError(f"{str(path)!r} ends in {path.suffix!r}; readable are {', '.join(_READERS)} and hub names")
        return _READERS[suffix](path)
    if path.exists() or suffix in _READERS or str(source).startswith((".", "/", "~")):
        kind = "is a folder" if path.is_dir() else "is not there"
        raise DataError(f"{str(source)!r} {kind}; give one file ({', '.join(_READERS)}) or a hub name")
    return _read_hub(str(source))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text ({error}); save it as UTF-8") from error


def _read_txt(path: Path) -> list[Row]:
    text = _read_text(path)
    return [{"text": text}] if text.strip() else []


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    # split("\n"), not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} of {str(path)!r} is not JSON: {error}") from error
    return rows


def _read_json(path: Path) -> list[Row]:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line under a .json name, as many published sets are
            return _read_jsonl(path)
        raise DataError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(content, list):
        raise DataError(f"{str(path)!r} holds {type(content).__name__}; it must be a list of rows")
    return content


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)  # the default stops at 128 KiB, short of a long document
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{str(path)!r}, line {reader.line_num}: {error}") from error
    for number, row in enumerate(rows, 1):
        # DictReader files surplus cells under None and fills missing ones with None.
        if None in row or None in row.values():
            raise DataError(
                f"row {number} of {str(path)!r} has not as many cells as the header "
                f"({', '.join(reader.fieldnames or [])}); quote cells that hold commas"
            )
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        return list(pq.read_table(path).to_pylist())
    except pa.ArrowException as error:
        raise DataError(f"{str(path)!r} is not a readable parquet file: {error}") from error


def _read_hub(source: str) -> list[Row]:
    import datasets  # type: ignore[import-untyped]

    name, _, split = source.partition(":")
    try:
        return [dict(row) for row in datasets.load_dataset(name, split=split or "train")]
    except Exception as error:  # the hub client raises a dozen unrelated classes, from HTTP to ValueError
        raise DataError(
            f"{source!r} is no file here, and loading it from the hub failed: {error}. "
            "Check the spelling, the split (name:split) and the network"
        ) from error


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet, ".txt": _read_txt,
}  # fmt: skip
