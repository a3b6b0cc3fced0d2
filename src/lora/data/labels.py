"""Rows of a text and its label, for a classifier."""

from collections.abc import Sequence

from ..errors import DataError
from .sound import Row, all_told, place, shown

TEXT_FIELDS = ("text", "sentence")
LABEL_FIELD = "label"


def labelled_texts(rows: Sequence[Row], argument: str = "data") -> list[tuple[str, str]]:
    """(text, label) of each row. Raises `DataError` that names the rows without one of them."""
    found: list[tuple[str, str]] = []
    faults: list[str] = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(_labelled(row))
        except DataError as error:
            faults.append(f"row {place(row, number)}: {error}")
    if faults:
        raise DataError(f"{argument}: {all_told(faults, 'cannot be trained on')}")
    return found


def _labelled(row: Row) -> tuple[str, str]:
    field = text_field(row)
    if field is None or row.get(LABEL_FIELD) is None:
        raise DataError(
            f"its fields are {shown(list(row))}; a classifier's rows have text or sentence, and label (a table names "
            "its columns in its first line)"
        )
    text, label = row[field], row[LABEL_FIELD]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{field} is {shown(text)}; it must be text")
    if not isinstance(label, (str, int)) or not str(label).strip():
        raise DataError(f"label is {shown(label)}; it must be a name or a whole number")
    return text, str(label).strip()


def labelled_format(row: Row) -> str:
    """The format's name, such as `sentence/label`."""
    return f"{text_field(row)}/{LABEL_FIELD}"


def text_field(row: Row) -> str | None:
    return next((field for field in TEXT_FIELDS if field in row), None)
