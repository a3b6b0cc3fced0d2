"""The state of a run on disk, every few steps: all that a resume needs to go on to the bit."""

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerState

import lora

from ..errors import LoraError, LoraWarning
from ..files.commit import replaced
from ..files.header import CONFIG_FILE, TENSOR_FILE
from .manifest import committed, manifest_of
from .metrics import METRICS_FILE
from .place import Place
from .recipe import RECIPE_FILE, Recipe
from .steps import RunCallback
from .trainer import LoraTrainer
from .trees import restore_optimizer, write_tree

STATE_FILE, SCHEDULER_FILE, RANDOM_FILE = "state.json", "scheduler.json", "random.json"
# What a checkpoint is made of, as a resume calls it, and the files of each.
PARTS = {
    "adapter": (CONFIG_FILE, TENSOR_FILE),
    "state": (STATE_FILE, RECIPE_FILE),
    "optimizer": ("optimizer.json", "optimizer.safetensors"),
    "scheduler": (SCHEDULER_FILE,),
    "random": (RANDOM_FILE,),
    "metrics": (METRICS_FILE,),
}
_KEPT = 2  # of the newest: one more than is needed, for the day that its disk has lost a bit


@dataclass(frozen=True)
class Identity:
    """Which run a checkpoint is of. started: seconds since 1970. data, eval_data: SHA-256 of the encoded rows. dtype:
    of the base. before: SHA-256 of what trains as it was before the first step."""

    run: str
    started: float
    forced: bool
    data: str
    eval_data: str | None
    dtype: str
    before: str


class Checkpoints(RunCallback):
    """Comes last of a run's callbacks: saves every `length.save_every` steps, at the end, and where the best is.

    interrupted: whether a signal has ended the training. best: the step whose evaluation is the best so far,
    0 for none. paused: the context of what is no training time. newest: the newest checkpoint of this run.
    """

    trainer: LoraTrainer

    def __init__(
        self, place: Place, recipe: Recipe, identity: Identity, kept: Sequence[RunCallback],
        interrupted: Callable[[], bool], best: Callable[[], int], paused: Callable[[str], AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        self.place, self.recipe, self.identity, self.kept = place, recipe, identity, kept
        self.interrupted, self.best, self.paused = interrupted, best, paused
        self.newest: Path | None = None
        self._over = self._told = False

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        self._over = step >= state.max_steps or (control.should_training_stop and not self.interrupted())
        if control.should_training_stop or step % self.trainer.length.save_every == 0 or step == self.best():
            with self.paused("saving a checkpoint"):
                self.save()

    def save(self) -> Path | None:
        """Write the state after the last step; None where there was no step, or it could not be written (said once).

        A run does not end for a full disk: it goes on, tries again at the next checkpoint, and at the end saves its
        adapter elsewhere.
        """
        step = self.trainer.state.global_step
        folder = self.place.step(step)
        if step == 0 or self.newest == folder:
            return self.newest
        try:
            self._write(folder, step)
        except (LoraError, OSError) as error:
            left = f"the newest is that of {self.newest.name}" if self.newest else "there is none yet"
            if not self._told:
                why = getattr(error, "strerror", None) or error
                warnings.warn(f"out: the checkpoint of step {step} could not be saved ({why}); {left}. The run goes on "
                              "and tries again at the next one", LoraWarning, stacklevel=2)  # fmt: skip
            self._told = True
            return None
        self._told, self.newest = False, folder
        self._sweep()
        return folder

    def _write(self, folder: Path, step: int) -> None:
        trainer, identity = self.trainer, self.identity
        shutil.rmtree(folder, ignore_errors=True)  # of another run, or damaged: this run has not been here
        versions = {each.__name__: each.__version__ for each in (lora, torch, transformers)}
        notes = {"step": step, "run": identity.run, "started": identity.started, "versions": versions}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # paged states are read by the host
        with committed(folder, notes) as fresh:
            lora.save(trainer.model, fresh)
            assert trainer.lr_scheduler is not None
            write_tree(fresh, "optimizer", {"names": _names(trainer), "state": trainer.optimizer.state_dict()})
            _write_json(fresh / SCHEDULER_FILE, trainer.lr_scheduler.state_dict())
            _write_json(fresh / RANDOM_FILE, trainer.random.to_json())
            _write_json(fresh / STATE_FILE, self._state(step))
            (fresh / RECIPE_FILE).write_text(self.recipe.to_yaml(), encoding="utf-8")
            metrics = self.place.live / METRICS_FILE
            (fresh / METRICS_FILE).write_bytes(metrics.read_bytes() if metrics.is_file() else b"")
        with replaced(self.place.recipe) as file:
            file.write_text(self.recipe.to_yaml(), encoding="utf-8")

    def _state(self, step: int) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "step": step, "over": self._over, "position": trainer.position,
            "micro": {"size": trainer.micro.size, "parts": trainer.micro.parts},
            "skipped": trainer.guard.skipped, "best": self.best(),
            "callbacks": {type(each).__name__: each.state() for each in self.kept},
            "recipe": self.recipe.model_dump(mode="json"), "identity": vars(self.identity),
        }  # fmt: skip

    def _sweep(self) -> None:
        """Keep the newest two of this run and the best; those of other runs go with the first of this one."""
        mine = [path for path in self.place.steps() if (manifest_of(path) or {}).get("run") == self.identity.run]
        kept = {*mine[:_KEPT], self.place.step(self.best())}
        for path in self.place.steps():
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


def _names(trainer: LoraTrainer) -> list[list[str]]:
    """The names of the optimizer's parameters, group by group."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in trainer.optimizer.param_groups]


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_optimizer(trainer: LoraTrainer, saved: dict[str, Any]) -> None:
    """Give the trainer's optimizer a state by `write_tree`. Raises `LoraError` where it is of other parameters."""
    if saved.get("names") != _names(trainer):
        raise LoraError("resume: the optimizer's state is of other parameters than the ones that train here")
    restore_optimizer(trainer.optimizer, saved["state"])
