"""One file of rows, by its suffix. What a file cannot be read for is one `DataError` that names it and the line."""

import csv
import gzip
import io
import json
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError, LoraWarning
from .arrow import rows_of
from .sound import Broken, Row, shown

_GZIP = b"\x1f\x8b"
_DELIMITERS = ",;\t"


def suffix_of(path: Path) -> str:
    """`.jsonl` of `rows.jsonl` and of `rows.jsonl.gz`."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def read_file(path: Path) -> list[Any]:
    """The rows of one file as they stand in it, unchecked; `path` has a suffix of `READERS`.

    A row that cannot be parsed is a `Broken` there. A file that is gzipped and not called so, or the reverse, is read
    as what it is, with a warning: the name may be that of a file that was not meant.

    Raises:
        DataError: the file cannot be opened, unpacked or parsed.
    """
    try:
        data = path.read_bytes()
        is_packed, is_called_so = data.startswith(_GZIP), path.suffix.lower() == ".gz"
        if is_packed:  # by its bytes: browsers and tools unpack or pack without changing the name
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error or type(error).__name__}") from error
    if is_packed != is_called_so:
        is_so = "is gzipped and not called .gz" if is_packed else "is called .gz and not gzipped"
        warnings.warn(f"{str(path)!r} {is_so}; it is read as it is", LoraWarning, stacklevel=5)
    return READERS[suffix_of(path)](path, data)


def _text(path: Path, data: bytes, nul: bool = True) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{str(path)!r}, line {line}, is not UTF-8 text ({error}); save it as UTF-8") from error
    if not nul and "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{str(path)!r}, line {line}, holds a NUL byte, which no text has; save it as UTF-8 text")
    return text


def _read_txt(path: Path, data: bytes) -> list[Any]:
    text = _text(path, data, nul=False)
    return [{"text": text}] if text.strip() else []


def _object(pairs: list[tuple[str, Any]]) -> Row:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {shown(twice)} is there twice")
    return fields


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


def _why(error: Exception) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)


def _read_jsonl(path: Path, data: bytes) -> list[Any]:
    rows: list[Any] = []
    # split("\n"), not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(_text(path, data).split("\n"), 1):
        try:
            rows += [_decode(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            rows.append(Broken(f"line {number}", f"is not JSON: {_why(error)}"))
    return rows


def _read_json(path: Path, data: bytes) -> list[Any]:
    text = _text(path, data)
    if not text.strip():
        return []
    try:
        content = _decode(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # one object a line under a .json name, as many published sets
            return _read_jsonl(path, data)
        raise DataError(f"{str(path)!r} is not JSON: {_why(error)}") from error
    if not isinstance(content, list):
        fields = content if isinstance(content, dict) else {}
        lists = [name for name, value in fields.items() if isinstance(value, list)]
        hint = f" (write what stands under {shown(lists[0])} alone)" if len(lists) == 1 else ""
        raise DataError(f"{str(path)!r} holds {type(content).__name__}; it must be a list of rows{hint}")
    return content


def _read_csv(path: Path, data: bytes) -> list[Any]:
    text = _text(path, data, nul=False).lstrip("\r\n")
    header = next(iter(text.splitlines()), "")
    counts = {each: len(next(csv.reader([header], delimiter=each), [])) for each in _DELIMITERS}
    return _table(path, text, max(_DELIMITERS, key=lambda each: counts[each]))


def _read_tsv(path: Path, data: bytes) -> list[Any]:
    text = _text(path, data, nul=False)
    rows = _table(path, text, "\t")
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if any(isinstance(row, Broken) for row in rows) and len({line.count("\t") for line in lines}) == 1:
        # Many published .tsv files do not quote: a quotation mark is part of a text there.
        return _table(path, "\n".join(lines), "\t", csv.QUOTE_NONE)
    return rows


def _table(path: Path, text: str, delimiter: str, quoting: Any = csv.QUOTE_MINIMAL) -> list[Any]:
    csv.field_size_limit(sys.maxsize)  # the default stops at 128 KiB, short of a long document
    reader = csv.reader(
        io.StringIO(text, newline=""), strict=quoting != csv.QUOTE_NONE, delimiter=delimiter, quoting=quoting
    )
    parsed = _parsed(reader)
    names: Any = next(parsed, [])
    if isinstance(names, Broken):
        raise DataError(f"{str(path)!r}: its header, {names.at}, {names.why}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{str(path)!r} has two columns named {twice!r}; rename one")
    mark = "tabs" if delimiter == "\t" else f"{delimiter!r}"
    uneven = f"has not as many cells as the header ({shown(names)}); quote cells that hold {mark}"
    rows: list[Any] = []
    for number, cells in enumerate(parsed, 1):
        if isinstance(cells, Broken):
            rows.append(cells)
        elif len(cells) != len(names):
            rows.append(Broken(f"row {number}", uneven))
        else:
            rows.append(dict(zip(names, cells, strict=True)))
    return rows


def _parsed(reader: Any) -> Iterator[Any]:
    """The cells of each row that is not empty; a `Broken` where it cannot be parsed, after which the next line is."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Broken(f"near line {line}", f"cannot be read as a row: {error}")
            continue
        if cells:
            yield cells


def _read_parquet(path: Path, data: bytes) -> list[Any]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        # Without threads of its own, which a process that ends at once may be aborted by.
        return rows_of(pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} is not a readable parquet file: {error}") from error


READERS: dict[str, Callable[[Path, bytes], list[Any]]] = {
    ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv,
    ".parquet": _read_parquet, ".txt": _read_txt,
}  # fmt: skip
READABLE = ", ".join(READERS)
