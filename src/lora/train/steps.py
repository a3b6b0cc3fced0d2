"""What a callback of a run is told of each step, and what it keeps for the way back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerState


@dataclass(frozen=True)
class Step:
    """The numbers of one optimizer step.

    number: from 1, over the whole run, also after a resume.
    loss: the mean over the step's trained tokens, whatever micro-batches it was taken in.
    grad_norm: of all gradients, before they were clipped.
    lr: what the step was taken with.
    tokens: of the step's rows, padding left out.
    trained: how many of them the loss is the mean of.
    """

    number: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    trained: int


class RunCallback(TrainerCallback):
    """transformers' callback with what a run of ours tells and asks beside it. Order: `on_step`, then `on_step_end`."""

    def on_step(self, step: Step) -> None:
        """A step was taken; steps that were skipped for a loss that is not finite are not told."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave when the checkpoint was written; before `on_train_begin`."""


class Teller(TrainerCallback):
    """Comes first of a run's callbacks: tells the others of each step that the optimizer took.

    begin: called before the others begin. last: the step that was taken last. passes: how far the run is in its rows.
    """

    def __init__(
        self, told: Sequence[RunCallback], begin: Callable[[], None], last: Callable[[], Step],
        passes: Callable[[], float],
    ) -> None:  # fmt: skip
        self.told, self.begin, self.last, self.passes = told, begin, last, passes

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.begin()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        state.epoch = self.passes()
        for each in self.told:
            each.on_step(self.last())
