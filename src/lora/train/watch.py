"""What happens at each step: counted and shown."""

import time
from collections import deque
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerState

from .steps import RunCallback, Step


class StepWatch(RunCallback):
    """Keeps the counts and the recent losses, and shows them.

    Args:
        console: where to write: a live bar on a terminal, a line every few steps elsewhere.
        log_every: steps between two such lines, and over how many steps `recent_loss` is the mean.
    """

    def __init__(self, console: Console, log_every: int) -> None:
        self.console, self.log_every = console, log_every
        self.losses: deque[float] = deque(maxlen=log_every)
        self.tokens = self.steps = 0
        self.eval_loss: float | None = None
        self._started = self._ended = 0.0
        self._bar = Progress(
            TextColumn("training"), BarColumn(), TextColumn("{task.fields[line]}"), console=console, transient=True
        )

    def stop(self) -> None:
        """Takes the bar away; to be called however the run ended."""
        if self.console.is_terminal:  # a bar that never started would print an empty line
            self._bar.stop()

    @property
    def recent_loss(self) -> float:
        return sum(self.losses) / max(1, len(self.losses))

    @property
    def seconds(self) -> float:
        return (self._ended or time.perf_counter()) - self._started

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        self._task = self._bar.add_task("training", total=state.max_steps, line="first step")
        if self.console.is_terminal:
            self._bar.start()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._ended = time.perf_counter()

    def on_step(self, step: Step) -> None:
        self.losses.append(step.loss)
        self.tokens += step.tokens
        self.steps = step.number

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        left = timedelta(seconds=round(self.seconds / max(1, self.steps) * (state.max_steps - self.steps)))
        line = (
            f"step {self.steps}/{state.max_steps}  loss {self.recent_loss:.4f}  "
            f"{self.tokens_per_second:,.0f} tokens/s  {left} left"
        )
        step = state.global_step
        self._bar.update(self._task, completed=step, line=line)
        if not self.console.is_terminal and (step % self.log_every == 0 or step in (1, state.max_steps)):
            self.console.print(line, highlight=False)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.eval_loss = float(kwargs["metrics"]["eval_loss"])
        self.console.print(f"step {state.global_step}: eval loss {self.eval_loss:.4f}", highlight=False)
