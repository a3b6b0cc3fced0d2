"""A run's numbers on disk: metrics.jsonl, an object for each step and each evaluation.

Lines are appended and handed to the system at once, so that a killed run has them all. A run that goes on from a
checkpoint drops what an earlier try wrote past it: no step stands there twice.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerState

from ..files.commit import replaced, told
from .steps import RunCallback, Step
from .watch import Watch

METRICS_FILE = "metrics.jsonl"


class Journal:
    """A file of JSON lines that is added to; each line has the `step` that it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def open(self, after: int) -> None:
        """Keeps the lines up to step `after` and goes on behind them; with 0 the file starts anew."""
        self.close()
        with told(f"out: {str(self.path)!r} could not be written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read(self.path) if line["step"] <= after] if after else []
            with replaced(self.path) as fresh:
                fresh.write_text("".join(_line(each) for each in kept), encoding="utf-8")
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds one line, whole. Before `open` and after `close` there is nobody to write for."""
        if self._file is not None:
            with told(f"out: {str(self.path)!r} could not be written"):
                self._file.write(_line(line))
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Metrics(RunCallback):
    """Writes each step of a `Watch` that comes before it. `evaluated` is for who evaluates.

    Args:
        folder: where metrics.jsonl goes.
        after: the step of the checkpoint that the run goes on from; 0 for a fresh run.
    """

    def __init__(self, folder: Path, watch: Watch, after: int = 0) -> None:
        self.watch, self.after = watch, after
        self.journal = Journal(folder / METRICS_FILE)

    def evaluated(self, numbers: Mapping[str, Any]) -> None:
        """An evaluation: `step`, `eval_loss` and what else was measured."""
        self.journal.write(numbers)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.journal.open(self.after)

    def on_step(self, step: Step) -> None:
        assert self.watch.latest is not None and self.watch.latest.step == step.number, "Watch comes first"
        self.journal.write(asdict(self.watch.latest))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.journal.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; none where there is no file. A last line that was cut by a crash is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _line(numbers: Mapping[str, Any]) -> str:
    """One object as JSON, which has no NaN: what is not finite is null, as for a step that was skipped."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"
