"""Metrics to TensorBoard, trackio and Weights & Biases, by transformers' own callbacks."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.integrations import integration_utils

from ..errors import LoraError, near
from .quiet import quiet
from .steps import RunCallback
from .watch import Watch

# What each needs, by the names that pip knows them by.
PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


def check_trackers(names: Sequence[str]) -> None:
    """Raises `LoraError` for a tracker that is unknown or not installed. Imports none of them."""
    for name in names:
        if name not in PACKAGES:
            raise LoraError(f"track is {name!r}; allowed: {', '.join(PACKAGES)}{near(name, PACKAGES)}")
        if find_spec(PACKAGES[name]) is None:
            raise LoraError(
                f"track is {name!r}, and it is not installed; pip install {PACKAGES[name]}, or leave it out"
            )


class Trackers(RunCallback):
    """Hands a `Watch`'s numbers to transformers' callbacks, which know the services.

    They are told every `log_every` steps, of the mean over those, as the console is, and of each evaluation.
    TensorBoard's files go into the run's folder unless TENSORBOARD_LOGGING_DIR says otherwise; trackio and wandb keep
    all runs of a user in one place, which their own settings (TRACKIO_DIR, WANDB_PROJECT, WANDB_MODE) name.

    Args:
        names: of `PACKAGES`.
        folder: the run's.
        run_name: what the run is called there.

    Raises:
        LoraError: a tracker that is unknown or not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, run_name: str, watch: Watch) -> None:
        check_trackers(names)
        self.watch, self.run_name = watch, run_name
        self._begun: tuple[Any, TrainerState, Any] | None = None
        self._callbacks = [_callback(name) for name in dict.fromkeys(names)]
        for each in self._callbacks:
            if isinstance(each, integration_utils.TensorBoardCallback) and each.logging_dir is None:
                each.logging_dir = str(folder / "tensorboard")

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._begun = args, state, control
        args.run_name = self.run_name
        for each in self._callbacks:
            with _aside():
                each.on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        latest = self.watch.latest
        step = state.global_step
        if latest is not None and (step % self.watch.log_every == 0 or step == state.max_steps):
            self._log(
                {
                    "loss": self.watch.recent_loss, "learning_rate": latest.lr, "grad_norm": latest.grad_norm,
                    "tokens": self.watch.tokens, "tokens_per_second": latest.tokens_per_second,
                    "memory": latest.memory,
                }
            )  # fmt: skip

    def evaluated(self, numbers: Mapping[str, Any]) -> None:
        """An evaluation, as `Evaluations` tells it."""
        self._log({name: value for name, value in numbers.items() if name != "step"})

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        for each in self._callbacks:
            with _aside():
                each.on_train_end(args, state, control, **kwargs)
        self._begun = None

    def _log(self, numbers: dict[str, Any]) -> None:
        if self._begun is not None:
            for each in self._callbacks:
                each.on_log(*self._begun, logs=dict(numbers))


@contextmanager
def _aside() -> Iterator[None]:
    """What the services print goes to stderr: stdout is for the command's results."""
    with quiet(), redirect_stdout(sys.stderr):
        yield


def _callback(name: str) -> TrainerCallback:
    kinds: dict[str, type[TrainerCallback]] = integration_utils.INTEGRATION_TO_CALLBACK
    return kinds[name]()
