"""Rows out of an Arrow table, as plain dictionaries."""

from typing import Any

from .sound import Broken


def rows_of(table: Any) -> list[Any]:
    """Each row of a `pyarrow.Table`; a `Broken` where one holds bytes that are no UTF-8 text."""
    try:
        return list(table.to_pylist())
    except UnicodeDecodeError:  # pyarrow takes any bytes for text until they are read
        return [_row(table, index) for index in range(table.num_rows)]


def _row(table: Any, index: int) -> Any:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return Broken(f"row {index + 1}", f"holds bytes that are not UTF-8 text ({error})")
