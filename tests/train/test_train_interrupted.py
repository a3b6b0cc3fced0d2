"""Signals, a folder that cannot be written to, and a folder that another run is in."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora
from lora import LoraError
from lora.errors import CheckError, Stopped
from lora.files.commit import locked
from lora.train import run
from said import said
from tiny_base import save_tiny_base
from tiny_run import at_batches, recipe_of, same


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it should end."""
    return run(recipe_of(base, tmp_path_factory.mktemp("good"))).out


def signals_at(batch: int, *numbers: int, pause: float = 0.0) -> Callable[[int, Any], Any]:
    def does(number: int, loss: Any) -> Any:
        for each in numbers if number == batch else ():
            os.kill(os.getpid(), each)
            time.sleep(pause)
        return loss

    return does


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    base: Path, good: Path, tmp_path: Path, number: int, code: int
) -> None:
    before = signal.getsignal(number)
    plan = recipe_of(base, tmp_path, save_every=50)
    with at_batches(signals_at(3, number)), pytest.raises(Stopped, match="after step 3 is in .*step-000003'") as e:
        run(plan)
    assert e.value.exit_code == code
    assert signal.getsignal(number) is before
    command = re.search(r"to go on: lora train (\S+) --resume auto", str(e.value))
    assert command is not None
    with said("resume: from"):
        assert same(run(lora.train.load_recipe(command[1]), resume="auto").out, good)


def test_the_line_that_goes_on_stays_valid_until_the_run_is_finished(base: Path, good: Path, tmp_path: Path) -> None:
    plan = recipe_of(base, tmp_path, save_every=1)
    with at_batches(signals_at(1, signal.SIGINT)), pytest.raises(Stopped) as e:
        run(plan)
    command = re.search(r"to go on: lora train (\S+) --resume auto", str(e.value))
    assert command is not None
    with said("resume: from"), at_batches(signals_at(4, signal.SIGINT)), pytest.raises(Stopped) as e:
        run(lora.train.load_recipe(command[1]), resume="auto")
    assert command[0] in str(e.value)
    assert not (Path(plan.out) / "checkpoints" / "step-000001").exists()
    with said("resume: from"):
        assert same(run(lora.train.load_recipe(command[1]), resume="auto").out, good)
    assert "is finished" in run(lora.train.load_recipe(command[1]), resume="auto").lines[0]


def test_second_interrupt_within_50_ms_does_not_break_the_save(base: Path, tmp_path: Path) -> None:
    plan = recipe_of(base, tmp_path, save_every=50)
    save, pressed = lora.save, []

    def slow_save(*args: Any, **kwargs: Any) -> None:
        pressed.append(1)
        os.kill(os.getpid(), signal.SIGINT)  # amid the save
        save(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, at_batches(signals_at(2, *[signal.SIGINT] * 2, pause=0.02)):
        patch.setattr(lora, "save", slow_save)
        with pytest.raises(Stopped, match="after step 2 is in"):
            run(plan)
    assert pressed == [1]
    assert (Path(plan.out) / "checkpoints" / "step-000002" / "manifest.json").is_file()


def test_an_interrupt_before_the_first_step_stops_at_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("lora.train.adapted.load_base", load)
    plan = recipe_of(base, tmp_path)
    with pytest.raises(Stopped, match="stopped by SIGTERM") as e:
        run(plan)
    assert e.value.exit_code == 143
    assert not Path(plan.out).exists()


def test_force_then_interrupt_leaves_the_old_adapter(base: Path, good: Path, tmp_path: Path) -> None:
    plan = recipe_of(base, tmp_path, seed=7)
    out = run(recipe_of(base, tmp_path, max_steps=1)).out
    old = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with at_batches(signals_at(3, signal.SIGINT)), pytest.raises(Stopped, match="step-000003"):
        run(plan, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == old
    with said("resume: from"):
        run(plan, resume="auto")
    assert not same(out, good)
    whole = run(recipe_of(base, tmp_path, seed=7, out=str(tmp_path / "whole"))).out
    assert same(out, whole)
    assert not (out / "checkpoints" / "metrics.jsonl").exists()


def test_an_unfinished_run_is_not_thrown_away(base: Path, tmp_path: Path) -> None:
    plan = recipe_of(base, tmp_path)
    with at_batches(signals_at(1, signal.SIGINT)), pytest.raises(Stopped):
        run(plan)
    with pytest.raises(LoraError, match=r"not finished \(.* is step-000001\).*--resume auto.*--force"):
        run(plan)
    run(plan, force=True)


def test_unwritable_out_is_told_before_anything_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.train.job.check_needs", lambda *_: pytest.fail("something was looked at first"))
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraError, match="out: .*file' is a file"):
        run(recipe_of(base, tmp_path, out=str(tmp_path / "file" / "below")))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(LoraError, match="cannot be written to; give another folder"):
        run(recipe_of(base, tmp_path, out=str(tmp_path / "new")))


def test_unwritable_out_at_the_end_goes_elsewhere_and_says_where(
    base: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe_of(base, tmp_path, save_every=50)
    save = lora.save

    def full(model: Any, folder: Any, **kwargs: Any) -> None:
        if Path(plan.out) in (Path(folder), *Path(folder).parents):
            raise LoraError(f"{folder}: the adapter could not be saved (No space left on device)")
        save(model, folder, **kwargs)

    monkeypatch.setattr(lora, "save", full)
    with (
        said("the checkpoint of step 6 could not be saved"),
        pytest.raises(LoraError, match=r"No space left on device\).*\. The adapter is in '([^']*)' instead") as e,
    ):
        run(plan)
    elsewhere = re.search(r"is in '([^']*)' instead", str(e.value))
    assert elsewhere is not None
    assert Path(elsewhere[1]).parent == tmp_path
    assert same(elsewhere[1], good)
    assert {"run.json", "recipe.yaml", "metrics.jsonl"} <= {path.name for path in Path(elsewhere[1]).iterdir()}


def test_two_runs_into_one_folder_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    plan = recipe_of(base, tmp_path)
    checkpoints = Path(plan.out) / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "lock").write_text('{"pid": 4711, "host": "here", "since": "today"}\n')
    with locked(checkpoints / "lock"), pytest.raises(LoraError, match="another run is at work .* 4711 on here"):
        run(plan)


def test_one_step_trains(base: Path, tmp_path: Path) -> None:
    out = run(recipe_of(base, tmp_path, max_steps=1, warmup_steps=0)).out
    default = run(recipe_of(base, tmp_path, max_steps=None, batch_size=100, out=str(tmp_path / "default"))).out
    for folder in (out, default):
        model = lora.train.base.load_base(str(base), "float32")
        lora.load(model, folder)
        moved = [p for name, p in model.named_parameters() if name.endswith("B")]
        assert moved and all(p.abs().max() > 0 for p in moved)


def test_one_step_that_moves_nothing_is_a_failure(base: Path, tmp_path: Path) -> None:
    plan = recipe_of(base, tmp_path, max_steps=1, lr=1e-60)
    with pytest.raises(CheckError, match="has changed nothing") as e:
        run(plan)
    assert e.value.exit_code == 6
    assert not (Path(plan.out) / "adapter_model.safetensors").exists()
