"""What a run would train on, made visible: counts, and rows whose trained text can be told from the rest."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from .encode import IGNORED, Encoded, EncodedData, encode_rows
from .sound import Row
from .template import PromptTemplate

# So many rows are counted, taken evenly from all; more would keep a look waiting for minutes.
COUNTED = 20_000
OPEN, CLOSE = "⟦", "⟧"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a row must not steer the terminal


class Segment(NamedTuple):
    """A stretch of a row's text, all of it trained or none."""

    text: str
    trained: bool


class Spread(NamedTuple):
    """The least, the middle and the most of some counts."""

    least: int
    median: float
    most: int

    def __str__(self) -> str:
        return f"{self.least:,} to {self.most:,}, median {self.median:,.0f}"


@dataclass(frozen=True)
class Preview:
    """The encoded rows (evenly taken where there are more than `COUNTED`) of a source that holds `rows` rows."""

    rows: int
    data: EncodedData
    template: PromptTemplate

    @property
    def tokens(self) -> Spread:
        return _spread([len(row["input_ids"]) for row in self.data.rows])

    @property
    def trained(self) -> Spread:
        return _spread([sum(label != IGNORED for label in row["labels"]) for row in self.data.rows])

    def examples(self, count: int) -> list[list[Segment]]:
        """The first rows as they would be trained, in segments."""
        return [segments(row, self.template.tokenizer) for row in self.data.rows[:count]]

    def to_json(self, count: int) -> dict[str, Any]:
        return {
            "format": self.data.format, "rows": self.rows, "rows_counted": self.data.read,
            "rows_encoded": len(self.data.rows), "template": self.template.style, "max_length": self.data.max_length,
            "tokens": self.tokens._asdict(), "trained_tokens": self.trained._asdict(),
            "notes": str(self.data).splitlines()[1:],
            "examples": [[segment._asdict() for segment in example] for example in self.examples(count)],
        }  # fmt: skip


def preview(rows: Sequence[Row], template: PromptTemplate, max_length: int, argument: str = "data") -> Preview:
    """Encodes rows as a run would. Raises `DataError` as the run would."""
    step = max(1, -(-len(rows) // COUNTED))
    return Preview(len(rows), encode_rows(rows[::step], template, max_length, argument), template)


def segments(row: Encoded, tokenizer: Any) -> list[Segment]:
    """The text of a row, special tokens included, cut where training begins and ends."""
    found: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        trained = label != IGNORED
        if not found or found[-1][1] != trained:
            found.append(([], trained))
        found[-1][0].append(token)
    return [Segment(str(tokenizer.decode(ids)), trained) for ids, trained in found]


def printable(text: str) -> str:
    """The text with control characters written out."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def marked(example: Sequence[Segment]) -> str:
    """A row as plain text, its trained stretches between `OPEN` and `CLOSE`."""
    return "".join(f"{OPEN}{text}{CLOSE}" if trained else text for text, trained in example)


def _spread(counts: Sequence[int]) -> Spread:
    return Spread(min(counts), median(counts), max(counts))
