"""The run, seen: a live bar on a terminal, a line every few steps elsewhere."""

from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerState

from .watch import StepWatch


class RunProgress(TrainerCallback):
    """Loss, tokens a second and time left.

    Args:
        console: where to write.
        watch: where the numbers come from; it has to stand before this in the trainer's callbacks.
        log_every: steps between two lines when the console is no terminal.
    """

    def __init__(self, console: Console, watch: StepWatch, log_every: int) -> None:
        self.console, self.watch, self.log_every = console, watch, log_every
        self._bar = Progress(
            TextColumn("training"), BarColumn(), TextColumn("{task.fields[line]}"), console=console, transient=True
        )

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._task = self._bar.add_task("training", total=state.max_steps, line="first step")
        if self.console.is_terminal:
            self._bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        line = self._line(state.max_steps)
        self._bar.update(self._task, completed=state.global_step, line=line)
        if not self.console.is_terminal and (
            state.global_step % self.log_every == 0 or state.global_step in (1, state.max_steps)
        ):
            self.console.print(line, highlight=False)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.console.print(f"step {state.global_step}: eval loss {self.watch.eval_loss:.4f}", highlight=False)

    def stop(self) -> None:
        """Takes the bar away; to be called however the run ended."""
        if self.console.is_terminal:  # a bar that never started would print an empty line
            self._bar.stop()

    def _line(self, last: int) -> str:
        watch = self.watch
        left = watch.seconds / max(1, watch.steps) * (last - watch.steps)
        return (
            f"step {watch.steps}/{last}  loss {watch.recent_loss:.4f}  {watch.tokens_per_second:,.0f} tokens/s  "
            f"{timedelta(seconds=round(left))} left"
        )
