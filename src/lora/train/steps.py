"""What a callback of a run is told of each step, and what it keeps for the way back."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback


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
