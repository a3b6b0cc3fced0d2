"""metrics.jsonl: whole lines, at once, and no step twice."""

import io
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lora import LoraError
from lora.train import run
from lora.train.checkpoints import Checkpoints
from lora.train.metrics import METRICS_FILE, Journal, Metrics, read
from lora.train.steps import Step
from lora.train.watch import StepNumbers, Watch
from tiny_base import save_tiny_base
from tiny_run import recipe_of

FIELDS = ["step", "loss", "lr", "grad_norm", "tokens", "trained", "tokens_per_second", "memory", "seconds"]


def numbers(step: int, loss: float = 1.0) -> StepNumbers:
    return StepNumbers(step, loss, 1e-3, 0.5, 10, 5, 99.5, 1 << 20, step / 2)


def write_steps(folder: Path, steps: range, after: int = 0) -> Metrics:
    watch = Watch(Console(file=io.StringIO()), 10)
    metrics = Metrics(folder, watch, after)
    state: Any = SimpleNamespace(global_step=after, max_steps=99)
    metrics.on_train_begin(None, state, None)
    for step in steps:
        watch.latest = numbers(step)
        metrics.on_step(Step(step, 1.0, 0.5, 1e-3, 10, 5))
    return metrics


def test_each_step_is_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    metrics = write_steps(tmp_path / "new" / "out", range(1, 4))
    lines = (tmp_path / "new" / "out" / METRICS_FILE).read_text().splitlines()  # it is still open
    assert [list(json.loads(line)) for line in lines] == [FIELDS] * 3
    assert json.loads(lines[2]) == {
        "step": 3, "loss": 1.0, "lr": 1e-3, "grad_norm": 0.5, "tokens": 10, "trained": 5,
        "tokens_per_second": 99.5, "memory": 1 << 20, "seconds": 1.5,
    }  # fmt: skip
    metrics.evaluated({"step": 3, "eval_loss": 2.0})
    assert read(metrics.journal.path)[-1] == {"step": 3, "eval_loss": 2.0}
    metrics.on_train_end(None, SimpleNamespace(), None)  # type: ignore[arg-type]


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8)).evaluated({"step": 4, "eval_loss": 2.0})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "lo')  # killed within a write
    write_steps(tmp_path, range(6, 10), after=5)
    found = [(line["step"], "eval_loss" in line) for line in read(tmp_path / METRICS_FILE)]
    steps = [(step, False) for step in range(1, 10)]
    assert found == [*steps[:5], (4, True), *steps[5:]]


def test_a_fresh_run_starts_anew(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(1, 3))
    assert [line["step"] for line in read(tmp_path / METRICS_FILE)] == [1, 2]


def test_what_json_does_not_hold_is_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    journal.open(0)
    journal.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    journal.close()
    assert json.loads((tmp_path / "a.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "grad_norm": None,
    }  # fmt: skip


def test_a_place_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraError, match="metrics.jsonl' could not be written"):
        write_steps(tmp_path / "file" / "out", range(1, 2))


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read(tmp_path / METRICS_FILE) == []


def test_time_of_a_checkpoint_is_not_the_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Checkpoints.save

    def slowly(self: Checkpoints) -> Path | None:
        time.sleep(0.5)
        return save(self)

    monkeypatch.setattr(Checkpoints, "save", slowly)
    base = save_tiny_base(tmp_path / "base")
    result = run(recipe_of(base, tmp_path, max_steps=3, save_every=1))
    assert result.metrics["paused_seconds"] >= 1.5
    assert result.metrics["seconds"] < 1.5
