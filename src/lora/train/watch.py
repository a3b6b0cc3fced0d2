"""What a run looks like while it runs: the numbers of each step, counted once and shown."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerState

from .display import Display
from .steps import RunCallback, Step


@dataclass(frozen=True)
class StepNumbers:
    """One optimizer step, as metrics.jsonl has it.

    `loss` is the mean over the step's `trained` tokens, `grad_norm` the gradient's norm before it is clipped, `tokens`
    what the step read without padding, `tokens_per_second` of this step alone, `memory` bytes (see `memory_used`) and
    `seconds` the training time since the run began: earlier parts of a resumed run count; evaluations and checkpoints
    do not.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    trained: int
    tokens_per_second: float
    memory: int
    seconds: float


class Watch(RunCallback):
    """Counts the steps and shows them. Callbacks that come after it find a step's numbers in `latest`.

    Args:
        console: where to write: a live display on a terminal, a line every few steps elsewhere.
        log_every: steps between two such lines, and over how many steps `recent_loss` is the mean.
        unit: what a loss is the mean of: tokens, or a classifier's rows.
    """

    def __init__(self, console: Console, log_every: int, unit: str = "tokens") -> None:
        self.console, self.log_every, self.unit = console, log_every, unit
        self.latest: StepNumbers | None = None
        self.eval_loss: float | None = None
        self.tokens = self.trained = self.steps = 0
        self.seconds = self.paused_seconds = 0.0
        self._window: deque[tuple[int, float, int]] = deque(maxlen=log_every)  # step, loss, trained tokens
        self._mark: float | None = None  # when the time that is not yet in `seconds` began; None: nothing trains
        self._display = Display(console)

    @property
    def recent_loss(self) -> float:
        """The mean over the trained tokens, or rows, of the last `log_every` steps."""
        weight = sum(trained for _, _, trained in self._window)
        return sum(loss * trained for _, loss, trained in self._window) / weight if weight else math.nan

    @property
    def mean_of(self) -> str:
        """What `recent_loss` is a mean of, in words."""
        if not self._window:
            return "no step"
        first, last = self._window[0][0], self._window[-1][0]
        steps = f"step {last}" if first == last else f"steps {first} to {last}"
        return f"the {self.unit} of {steps}"

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @contextmanager
    def paused(self, why: str = "") -> Iterator[None]:
        """Within it, time is not the training's: an evaluation, a checkpoint. It is counted in `paused_seconds`."""
        running = self._mark is not None
        self._clock()
        start = time.perf_counter()
        self._display.note(why)
        try:
            yield
        finally:
            now = time.perf_counter()
            self.paused_seconds += now - start
            self._mark = now if running else None
            self._display.note("")

    def say(self, text: str) -> None:
        """A line that stays, above the display where there is one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def evaluated(self, step: int, loss: float, note: str = "") -> None:
        """The loss on the held-out rows after a step; `note` is what else there is to say about it."""
        self.eval_loss = loss
        text = f"step {step:,}: eval loss {loss:.4f}{note}"
        self.say(text)
        self._display.evaluated(text)

    def stop(self) -> None:
        """Takes the display away; to be called however the run ended."""
        self._display.stop()

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps, "tokens": self.tokens, "trained": self.trained, "seconds": self.seconds,
            "paused_seconds": self.paused_seconds, "eval_loss": self.eval_loss,
            "window": [list(each) for each in self._window],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self.steps, self.tokens, self.trained = state["steps"], state["tokens"], state["trained"]
        self.seconds, self.paused_seconds = state["seconds"], state["paused_seconds"]
        self.eval_loss = state["eval_loss"]
        self._window.extend((step, loss, trained) for step, loss, trained in state["window"])

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()
        self._display.start(state.global_step, state.max_steps)

    def on_step(self, step: Step) -> None:
        before = self.seconds
        self._clock()
        self.steps = step.number
        self.tokens += step.tokens
        self.trained += step.trained
        rate = step.tokens / max(self.seconds - before, 1e-9)
        self.latest = StepNumbers(
            step.number, step.loss, step.lr, step.grad_norm, step.tokens, step.trained, round(rate, 1), memory_used(),
            round(self.seconds, 3),
        )  # fmt: skip
        self._window.append((step.number, step.loss, step.trained))
        self._display.step(self.latest, self.recent_loss, self.mean_of)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.log_every == 0 or state.global_step in (1, state.max_steps):
            self._display.line()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._mark = None

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.evaluated(state.global_step, float(kwargs["metrics"]["eval_loss"]))

    def _clock(self) -> None:
        if self._mark is not None:
            now = time.perf_counter()
            self.seconds += now - self._mark
            self._mark = now


def memory_used() -> int:
    """Bytes: the most that was allocated on the GPU so far, or what this process holds where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil  # type: ignore[import-untyped]

    return int(psutil.Process().memory_info().rss)
