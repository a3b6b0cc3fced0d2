"""A sweep: many runs of one recipe with other values, the best held-out loss found, and a way back after a kill.

The trials stand in a journal within the recipe's `out` (optuna's, lines of JSON); a sweep that was ended goes on with
those that are left, and does again the one that it was ended in. Each trial is a run of its own, in a folder there.
"""

import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import LoraError, NonFiniteError, OutOfMemoryError
from ..files.commit import replaced
from .recipe import Recipe
from .signals import Signals

JOURNAL, SETTINGS_FILE, BEST, TRIALS, CHECKPOINTS = "journal.log", "sweep.json", "best.yaml", "trials", "checkpoints"
KINDS: dict[str, type] = {"lr": float, "r": int, "alpha": float, "targets": str, "dropout": float, "prompt_length": int}
"""The fields that can be swept, and what their values are."""
DEFAULT_TRIALS = 12
Runs = Callable[[Recipe], dict[str, float]]
"""A run of a recipe, and its metrics."""


@dataclass(frozen=True)
class Axis:
    """One swept field: a list of values, or a range that is searched by its logarithm."""

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def of(cls, text: str) -> "Axis":
        """From `lr=1e-4..1e-3`, `r=8,16` or `targets=q_proj+v_proj,all-linear`.

        Raises:
            LoraError: no such field, or no such values.
        """
        name, equals, values = text.partition("=")
        if not equals or name not in KINDS or not values:
            raise LoraError(f"over: got {text!r}; write FIELD=LOW..HIGH or FIELD=A,B,C, of {', '.join(KINDS)}")
        kind = KINDS[name]
        try:
            if ".." in values and kind is not str:
                low, high = (kind(end) for end in values.split(".."))
                if not 0 < low < high < math.inf:
                    raise ValueError
                return cls(name, (), low, high)
            choices = tuple(kind(value) for value in values.split(","))
        except ValueError:
            raise LoraError(
                f"over: got {text!r}; a range is two numbers above 0, the smaller first; a list holds values of "
                f"{kind.__name__}"
            ) from None
        if len(set(choices)) < len(choices):
            raise LoraError(f"over: got {text!r}, where a value stands twice")
        return cls(name, choices)

    def suggest(self, trial: Any) -> Any:
        if self.choices:
            return trial.suggest_categorical(self.name, list(self.choices))
        if KINDS[self.name] is int:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=True)
        return trial.suggest_float(self.name, self.low, self.high, log=True)


@dataclass(frozen=True)
class Trial:
    """loss: of the held-out rows; None where the run diverged or did not fit, and `why`."""

    number: int
    values: dict[str, Any]
    loss: float | None
    seconds: float
    why: str = ""


def sweep(
    recipe: Recipe, over: Sequence[str], *, trials: int | None = None, run: Runs,
    told: Callable[[Trial, int], None] = lambda trial, of: None, signals: Signals | None = None,
) -> list[Trial]:  # fmt: skip
    """All trials, those of earlier calls too, the best first; best.yaml and the picture are written beside them.

    Args:
        over: what `Axis.of` reads.
        trials: how many there shall be in the end; None is each combination where all are lists, or else 12.
        run: `train.job.run`, or what stands for it.
        told: called after each trial, with it and how many there will be.
        signals: those that are listened to meanwhile. Between two trials one waits until the journal is written.

    Raises:
        Stopped: by a signal between two trials; the next call goes on.
        LoraError: optuna is missing, nothing is held out, `out` holds another sweep or an adapter, or a trial's own.
    """
    if find_spec("optuna") is None:
        raise LoraError("lora sweep needs optuna; pip install 'lora-torch[sweep]'")
    if recipe.eval_data is None and recipe.eval_share is None:
        raise LoraError("lora sweep compares the loss of held-out rows; give eval_data or eval_share")
    axes = [Axis.of(text) for text in over]
    if not axes or len({axis.name for axis in axes}) < len(axes):
        raise LoraError(f"over: got {list(over)}; give each field once, at least one of {', '.join(KINDS)}")
    out = Path(recipe.out)
    signals, grid = signals or Signals(), _grid(axes, recipe.seed)
    wanted = trials or (len(grid) if grid else DEFAULT_TRIALS)
    with signals.waiting():
        _settle(out, recipe, axes)
        study = _study(out, recipe.seed)
        _queue(study, grid, out)
    signals.check()
    while len(_ended(study)) < wanted and (not grid or _waiting(study)):
        with signals.waiting():
            trial = study.ask()
            values = {axis.name: axis.suggest(trial) for axis in axes}
        signals.check()
        one = with_values(recipe, values, out / TRIALS / f"{trial.number:03d}")
        told(_one(study, trial, one, run, signals), wanted)
    found = sorted(_ended(study), key=lambda each: (each.loss is None, each.loss or 0.0, each.number))
    if found[0].loss is not None:
        best = with_values(recipe, found[0].values, out / "best")
        with replaced(out / BEST) as file:
            file.write_text(best.to_yaml(), encoding="utf-8")
    return found


def with_values(recipe: Recipe, values: dict[str, Any], out: Path) -> Recipe:
    """The recipe with values of a trial. Raises `LoraError` where they do not go together."""
    changed = {name: _list(value) if name == "targets" else value for name, value in values.items()}
    return Recipe.of(**{**recipe.model_dump(exclude_none=True), **changed, "out": str(out)})


def _list(text: str) -> str | list[str]:
    return text if text == "all-linear" else text.split("+")


def _one(study: Any, trial: Any, recipe: Recipe, run: Runs, signals: Signals) -> Trial:
    from optuna.trial import TrialState

    try:
        metrics = run(recipe.model_copy(update={"check": False, "samples": 0}))
        loss, why, seconds = metrics.get("eval_loss"), "", metrics.get("seconds", 0.0)
        if loss is None:
            raise LoraError("the run measured no eval_loss; give eval_data or a larger eval_share")
        if not math.isfinite(loss):
            loss, why = None, "the held-out loss is not finite"
    except (NonFiniteError, OutOfMemoryError) as error:
        loss, why, seconds = None, str(error), 0.0
    with signals.waiting():
        trial.set_user_attr("seconds", seconds)
        if why:
            trial.set_user_attr("why", why[:500])
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, loss)
        # Of a trial that is done only the adapter is wanted.
        shutil.rmtree(Path(recipe.out) / CHECKPOINTS, ignore_errors=True)
        ended = next(each for each in _ended(study) if each.number == trial.number)
    signals.check()
    return ended


def _settle(out: Path, recipe: Recipe, axes: list[Axis]) -> None:
    """Write what is swept, or see that the folder's sweep is this one."""
    told = {
        "over": {axis.name: list(axis.choices) or [axis.low, axis.high] for axis in axes},
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
    }
    file = out / SETTINGS_FILE
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) != json.loads(json.dumps(told)):
            raise LoraError(f"out: {str(out)!r} holds another sweep ({SETTINGS_FILE} differs); give another folder")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LoraError(f"out: {str(out)!r} is not empty and holds no sweep; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    with replaced(file) as temporary:
        temporary.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _study(out: Path, seed: int) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / JOURNAL)))
    study = optuna.create_study(storage=storage, study_name="sweep", direction="minimize", load_if_exists=True)
    # Another seed each time that it goes on: the same would draw the first values again.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def _grid(axes: list[Axis], seed: int) -> list[dict[str, Any]]:
    """Every combination, in a shuffled order, so that any part of them is fair; nothing where one axis is a range."""
    if not all(axis.choices for axis in axes):
        return []
    names = [axis.name for axis in axes]
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*(axis.choices for axis in axes))]
    random.Random(seed).shuffle(every)
    return every


def _queue(study: Any, grid: list[dict[str, Any]], out: Path) -> None:
    """What has to run: all of a new grid, and again what an earlier call was ended in."""
    from optuna.trial import TrialState

    if not study.trials:
        for values in grid:
            study.enqueue_trial(values)
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        shutil.rmtree(out / TRIALS / f"{trial.number:03d}", ignore_errors=True)  # what it had so far
        values = trial.params or trial.system_attrs.get("fixed_params")
        if values:
            study.enqueue_trial(values)


def _waiting(study: Any) -> bool:
    from optuna.trial import TrialState

    return bool(study.get_trials(states=(TrialState.WAITING,)))


def _ended(study: Any) -> list[Trial]:
    """The trials that came to an end of their own: with a loss, or with the reason for none."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.FAIL)
    return [
        Trial(t.number, dict(t.params), t.value, t.user_attrs.get("seconds", 0.0), t.user_attrs.get("why", ""))
        for t in study.get_trials(states=states) if t.state == TrialState.COMPLETE or "why" in t.user_attrs
    ]  # fmt: skip
