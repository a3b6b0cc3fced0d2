"""A step whose loss or gradient is not finite is not taken."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from ..errors import NonFiniteError
from .steps import RunCallback, Step


class Guard(TrainerCallback):
    """Checks each step before the optimizer takes it, and tells the others of it once it was taken."""

    def __init__(self, told: Sequence[RunCallback]) -> None:
        self.told = told
        self._micro: list[Tensor] = []
        self._step: Step | None = None

    def add(self, loss: Tensor, tokens: Tensor, trained: Tensor) -> None:
        """One forward and backward pass: its share of the step's loss, and its tokens. No device sync."""
        self._micro.append(torch.stack([loss.detach().double(), tokens.to(loss.device), trained.to(loss.device)]))

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model: torch.nn.Module = kwargs["model"]
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        numbers = torch.stack(self._micro).sum(0)
        self._micro.clear()
        loss, tokens, trained, gradient = torch.cat([numbers, norm.to(numbers)[None]]).tolist()  # one sync for all
        number = state.global_step + 1
        for name, value in (("loss", loss), ("gradient's norm", gradient)):
            if not math.isfinite(value):
                raise NonFiniteError(f"step {number}: the {name} is {value}, so the run was stopped before it", number)
        lr = kwargs["optimizer"].param_groups[0]["lr"]
        self._step = Step(number, loss, gradient, lr, int(tokens), int(trained))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        assert self._step is not None
        for each in self.told:
            each.on_step(self._step)
