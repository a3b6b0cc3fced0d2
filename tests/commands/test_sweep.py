"""`lora sweep`: what it tries, what it keeps, and that it goes on after a kill; most with runs that are made up."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from lora import LoraError
from lora.commands import app
from lora.errors import NonFiniteError, Stopped
from lora.train.recipe import Recipe, load_recipe
from lora.train.sweep import Axis, sweep
from lora.train.sweep_picture import draw
from tiny_base import save_tiny_base


def recipe(out: Path, **changes: Any) -> Recipe:
    return Recipe.of(**{"model": "m", "data": "d", "eval_data": "e", "out": str(out), **changes})


def made_up(seen: list[Recipe]) -> Callable[[Recipe], dict[str, float]]:
    """A run whose loss is least at lr 1e-3 and r 16."""

    def run(one: Recipe) -> dict[str, float]:
        seen.append(one)
        return {"eval_loss": 1 + abs(math.log10(one.lr or 1e-3) + 3) + abs(math.log2(one.r) - 4), "seconds": 2.0}

    return run


def test_a_grid_tries_each_combination_once_and_writes_the_best_recipe(tmp_path: Path) -> None:
    seen: list[Recipe] = []
    over = ["lr=1e-4,1e-3", "r=8,16,32", "targets=all-linear,q_proj+v_proj"]
    found = sweep(recipe(tmp_path / "s"), over, run=made_up(seen))
    assert len(found) == len(seen) == len({(s.lr, s.r, str(s.targets)) for s in seen}) == 12
    assert [t.loss for t in found] == sorted(t.loss for t in found if t.loss is not None)
    assert (found[0].values["lr"], found[0].values["r"], found[0].loss) == (1e-3, 16, 1.0)
    assert {str(s.targets) for s in seen} == {"all-linear", "['q_proj', 'v_proj']"}
    assert len({s.out for s in seen}) == 12 and not any(s.check or s.samples for s in seen)
    best = load_recipe(tmp_path / "s" / "best.yaml")
    assert (best.lr, best.r, best.check) == (1e-3, 16, True)
    again = sweep(recipe(tmp_path / "s"), over, run=made_up(seen))
    assert again == found and len(seen) == 12  # nothing is left to do


def test_a_range_is_searched_by_its_logarithm_and_the_same_from_the_same_seed(tmp_path: Path) -> None:
    seen: list[list[Recipe]] = [[], [], []]
    for runs, folder, seed in zip(seen, "abc", (0, 0, 1), strict=True):
        sweep(recipe(tmp_path / folder, seed=seed), ["lr=1e-5..1e-1", "r=4..64"], trials=14, run=made_up(runs))
    rates = [[one.lr for one in runs] for runs in seen]
    assert rates[0] == rates[1] != rates[2] and len(set(rates[0])) == 14
    assert all(1e-5 <= lr <= 1e-1 for lr in rates[0]) and sum(lr < 1e-3 for lr in rates[0]) > 3
    assert all(type(one.r) is int and 4 <= one.r <= 64 for one in seen[0])


@pytest.mark.parametrize("over", [["lr=1e-4..1e-2"], ["lr=1e-4,1e-3", "r=4,8"]], ids=["range", "grid"])
def test_a_sweep_that_was_killed_in_a_trial_does_that_one_again_and_those_that_are_left(
    over: list[str], tmp_path: Path
) -> None:
    seen: list[Recipe] = []
    journal = tmp_path / "values"

    def killed(one: Recipe) -> dict[str, float]:
        with journal.open("a") as file:
            file.write(f"{one.lr} {one.r}\n")
        if len(journal.read_text().splitlines()) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return made_up([])(one)

    child = os.fork()
    if child == 0:
        sweep(recipe(tmp_path / "s"), over, trials=4, run=killed)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    before = journal.read_text().splitlines()
    found = sweep(recipe(tmp_path / "s"), over, trials=4, run=made_up(seen))
    assert len(found) == 4 and len(seen) == 2  # the one that was ended, and the last
    assert before[2] in {f"{one.lr} {one.r}" for one in seen}
    assert len({tuple(t.values.items()) for t in found}) == 4


def test_a_trial_that_diverges_is_counted_and_is_never_the_best(tmp_path: Path) -> None:
    def run(one: Recipe) -> dict[str, float]:
        if (one.lr or 0) > 1e-2:
            raise NonFiniteError("the loss is NaN at step 3", 3)
        return {"eval_loss": math.nan if (one.lr or 0) > 1e-3 else 2.0}

    found = sweep(recipe(tmp_path / "s"), ["lr=1e-4,5e-3,1e-1"], run=run)
    assert [t.loss for t in found] == [2.0, None, None]
    assert {t.why for t in found} == {"", "the loss is NaN at step 3", "the held-out loss is not finite"}
    picture = draw(tmp_path, found, [Axis.of("lr=1e-4,5e-3,1e-1")])
    assert picture is not None and picture.stat().st_size < 80_000


@pytest.mark.parametrize(
    ("over", "changes", "said"),
    [
        (["lr=1e-3..1e-4"], {}, "the smaller first"),
        (["lr=0..1"], {}, "above 0"),
        (["depth=1,2"], {}, "lr, r, alpha, targets"),
        (["r=eight"], {}, "values of int"),
        (["r=8,8"], {}, "twice"),
        (["r=8", "r=16"], {}, "each field once"),
        ([], {}, "at least one"),
        (["r=8"], {"eval_data": None}, "held-out rows"),
    ],
)
def test_what_cannot_be_swept_is_refused_first(
    over: list[str], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(LoraError, match=said):
        sweep(recipe(tmp_path / "s", **changes), over, run=made_up([]))
    assert not (tmp_path / "s").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    sweep(recipe(tmp_path / "s"), ["r=8"], run=made_up([]))
    for over, changes in ((["r=16"], {}), (["r=8"], {"batch_size": 2})):
        with pytest.raises(LoraError, match="another sweep"):
            sweep(recipe(tmp_path / "s", **changes), over, run=made_up([]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(LoraError, match="not empty"):
        sweep(recipe(tmp_path / "other"), ["r=8"], run=made_up([]))


def test_a_signal_in_a_trial_is_told_and_the_command_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora.train.job as job

    seen: list[Recipe] = []

    def run(one: Recipe, force: bool) -> SimpleNamespace:
        if len(seen) == 1 and not again:
            raise Stopped(signal.SIGINT, "stopped by Ctrl-C. Nothing was saved on the way out")
        return SimpleNamespace(metrics=made_up(seen)(one))

    monkeypatch.setattr(job, "run", run)
    words = f"sweep --model m --data d --eval-data e --out {tmp_path / 's'} --over r=4,8,16"
    again = False
    ended = CliRunner().invoke(app, words.split())
    assert ended.exit_code == 130
    assert "error: stopped by Ctrl-C. The trials that ended are kept in" in ended.output
    assert "1 of this call" in ended.output and "Nothing was saved" not in ended.output
    again = True
    assert CliRunner().invoke(app, words.split()).exit_code == 0 and len(seen) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["ask", "tell", "_study"])
def test_a_signal_between_two_trials_ends_the_sweep_as_one_within_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: int
) -> None:
    """It waits until the journal is written, so that the trial whose run is done counts."""
    import optuna

    import lora.train.job as job
    import lora.train.sweep as of_sweep

    seen: list[Recipe] = []
    monkeypatch.setattr(job, "run", lambda one, force: SimpleNamespace(metrics=made_up(seen)(one)))
    owner = of_sweep if moment == "_study" else optuna.Study
    inner = getattr(owner, moment)

    def pressed(*args: Any, **kwargs: Any) -> Any:
        if len(seen) == (0 if moment == "_study" else 1) and not again:
            os.kill(os.getpid(), number)
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, moment, pressed)
    words = f"sweep --model m --data d --eval-data e --out {tmp_path / 's'} --over r=4,8,16"
    again = False
    ended = CliRunner().invoke(app, words.split())
    assert ended.exit_code == 128 + number
    assert "error: stopped by" in ended.output and "the same command goes on" in ended.output
    assert len(seen) == (0 if moment == "_study" else 1)
    again = True
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    assert len(seen) == 3 and sorted(one.r for one in seen) == [4, 8, 16]


def test_the_command_trains_for_real(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"count {n}", "completion": "one two"}) + "\n" for n in range(6)))
    words = f"--model {base} --data {rows} --eval-data {rows} --out {tmp_path / 's'} --max-steps 2 --batch-size 6"
    done = CliRunner().invoke(app, ["sweep", *words.split(), "--over", "lr=1e-3,1e-2", "--dtype", "fp32"])
    assert done.exit_code == 0, done.exception
    assert "held-out loss" in done.output and "best: lr 0.01" in done.output
    names = {path.name for path in (tmp_path / "s").iterdir()}
    assert {"best.yaml", "sweep.png", "sweep.json", "journal.log", "trials"} <= names
