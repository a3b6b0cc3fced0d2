"""What an evaluation found: a table, JSON, and the answers row by row."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..tables import table
from .columns import Measured
from .scores import most_frequent
from .sets import EvalSet


@dataclass
class Report:
    """The columns of each set, in the order of the sets; `more` are rows of another's making, such as lm-eval's."""

    columns: tuple[str, ...]
    sets: list[tuple[EvalSet, dict[str, Measured]]] = field(default_factory=list)
    more: list[tuple[str, str, dict[str, float]]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = list(self._lines())
        blind = any(floor is not None for *_, floor, _ in lines)
        header = ["task", "rows", "metric", *(["most frequent label"] if blind else []), *self.columns]
        rows = [
            [
                name,
                "" if rows is None else f"{rows:,}",
                metric,
                *([_shown(floor)] if blind else []),
                *(_shown(found.get(c)) for c in self.columns),
            ]
            for name, rows, metric, floor, found in lines
        ]
        notes = dict.fromkeys(m.note for _, measured in self.sets for m in measured.values() if m.note)
        return "\n".join([table(header, rows), *notes])

    def _lines(self) -> Iterator[tuple[str, int | None, str, float | None, dict[str, float]]]:
        """(task, rows, metric, what the most frequent label would have, value by column)"""
        for given, measured in self.sets:
            floors = most_frequent(given.targets()) if given.labels else {}
            for metric in given.metrics:
                found = {column: each.scores[metric] for column, each in measured.items()}
                yield given.name, len(given.rows), metric, floors.get(metric), found
        for name, metric, found in self.more:
            yield name, None, metric, None, found

    def to_json(self) -> str:
        """`[{"task", "rows", "metric", "most_frequent_label", "base", ...}]`"""
        lines: list[dict[str, Any]] = [
            {"task": name, "rows": rows, "metric": metric, "most_frequent_label": floor, **found}
            for name, rows, metric, floor, found in self._lines()
        ]
        return json.dumps([{k: v for k, v in line.items() if v is not None} for line in lines], indent=2)

    def answers(self) -> Iterator[str]:
        """A line of JSON for each row: its fields, its task, and what each column answered."""
        for given, measured in self.sets:
            for number, row in enumerate(given.rows if given.prompt_of else ()):
                line: dict[str, Any] = {"task": given.name, **row, "references": given.references[number]}
                for column, each in measured.items():
                    line[column] = each.answers[given.prompt_of[number]] if each.answers else None
                yield json.dumps(line, ensure_ascii=False)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) >= 1000 else f"{value:.2f}"
