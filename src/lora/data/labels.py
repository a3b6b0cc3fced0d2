"""Rows of a text and its label, for a classifier."""

from collections.abc import Iterator, Sequence

from ..errors import DataError
from .sound import Row, place, shown

TEXT_FIELDS = ("text", "sentence")
LABEL_FIELD = "label"


def labelled_texts(rows: Sequence[Row], argument: str = "data") -> Iterator[tuple[str, str]]:
    """(text, label) of each row. Raises `DataError` for a row without one of them, by its place."""
    for number, row in enumerate(rows, 1):
        where = f"{argument}: row {place(row, number)}"
        field = text_field(row)
        if field is None or row.get(LABEL_FIELD) is None:
            raise DataError(
                f"{where}: its fields are {shown(list(row))}; a classifier's rows have text or sentence, and label (a "
                "table names its columns in its first line)"
            )
        text, label = row[field], row[LABEL_FIELD]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: {field} is {shown(text)}; it must be text")
        if not isinstance(label, (str, int)) or not str(label).strip():
            raise DataError(f"{where}: label is {shown(label)}; it must be a name or a whole number")
        yield text, str(label).strip()


def labelled_format(row: Row) -> str:
    """The format's name, such as `sentence/label`."""
    return f"{text_field(row)}/{LABEL_FIELD}"


def text_field(row: Row) -> str | None:
    return next((field for field in TEXT_FIELDS if field in row), None)
