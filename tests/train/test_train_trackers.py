"""Metrics in other people's tools: by transformers' callbacks, offline, refused by name where one is missing."""

import io
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lora import LoraError
from lora.train import trackers as module
from lora.train.steps import Step
from lora.train.trackers import Trackers, check_trackers
from lora.train.watch import Watch


def follow(names: list[str], folder: Path) -> None:
    """Four steps and an evaluation of a run that reports every second step."""
    from transformers import TrainingArguments

    watch = Watch(Console(file=io.StringIO()), 2)
    trackers = Trackers(names, folder, "a-run", watch)
    args = TrainingArguments(output_dir=str(folder / "unused"), report_to="none")
    state: Any = SimpleNamespace(
        global_step=0, max_steps=4, is_world_process_zero=True, is_hyper_param_search=False, trial_name=None
    )
    for each in (watch, trackers):
        each.on_train_begin(args, state, None, model=None)
    for step in range(1, 5):
        state.global_step = step
        watch.on_step(Step(step, 5.0 - step, 1.0, 0.1, 10, 4))
        trackers.on_step_end(args, state, None)
    trackers.evaluated({"step": 4, "eval_loss": 2.5, "eval_seconds": 0.1})
    trackers.on_train_end(args, state, None)
    trackers.evaluated({"step": 4, "eval_loss": 9.0})  # nobody listens any more


def test_tensorboard_has_the_runs_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    follow(["tensorboard"], tmp_path)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(2, 3.5), (4, 1.5)]
    assert [(e.step, e.value) for e in found.Scalars("eval/loss")] == [(4, 2.5)]
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"} <= set(found.Tags()["scalars"])
    assert not (tmp_path / "unused").exists()


def test_trackio_keeps_a_run_without_a_network(tmp_path: Path) -> None:
    """In a process of its own: trackio asks once, when it is imported, where its runs go."""
    code = f"""
from pathlib import Path
from test_train_trackers import follow
follow(["trackio"], Path({str(tmp_path)!r}))
import trackio
runs = trackio.Api().runs("huggingface")
assert [run.name for run in runs] == ["a-run"], runs
"""
    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "HOME": str(tmp_path / "home")}
    environment = {**os.environ, **here, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
    assert list((tmp_path / "trackio").iterdir())
    assert not (tmp_path / "home").exists()


def test_a_tracker_that_is_missing_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    real = util.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "wandb" else real(name))
    with pytest.raises(LoraError, match="track is 'wandb', and it is not installed; pip install wandb"):
        check_trackers(["tensorboard", "wandb"])


def test_a_tracker_that_nobody_knows_is_refused() -> None:
    with pytest.raises(LoraError, match="track is 'tensorbord'; allowed: tensorboard, trackio, wandb"):
        check_trackers(["tensorbord"])
