"""How a run's numbers are shown: one live display on a terminal, plain lines elsewhere."""

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from .watch import StepNumbers


class Display:
    """Shows steps. On a terminal it is one live block that is gone at the end; elsewhere a line when one is wanted."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("step {task.completed:,}/{task.total:,}  {task.fields[left]}"),
            console=console,
            auto_refresh=False,
        )
        self._live: Live | None = None
        self._task: TaskID | None = None
        self._figures, self._evaluation, self._doing = "the first step is on its way", "", ""
        self._began, self._first, self._step, self._total, self._left = 0.0, 0, 0, 0, ""

    def start(self, step: int, total: int) -> None:
        """From `step` on, which is above 0 for a run that goes on."""
        self._began, self._first, self._total = time.perf_counter(), step, total
        self._task = self._bar.add_task("training", total=total, completed=step, left="")
        if self.console.is_terminal:  # a display that never started would print an empty line
            self._live = Live(get_renderable=self._block, console=self.console, transient=True)
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, doing: str) -> None:
        """What goes on between two steps; empty: nothing."""
        self._doing = doing
        self._refresh()

    def evaluated(self, text: str) -> None:
        self._evaluation = text
        self._refresh()

    def step(self, numbers: "StepNumbers", loss: float, mean_of: str) -> None:
        """A step is done. `loss` is the mean over what `mean_of` says."""
        self._step, self._left = numbers.step, self._time_left(numbers.step)
        self._figures = (
            f"loss {loss:.4f} (mean over {mean_of})  lr {numbers.lr:.2e}  gradient norm {numbers.grad_norm:.3g}  "
            f"{numbers.tokens_per_second:,.0f} tokens/s  memory {size(numbers.memory)}"
        )
        if self._task is not None:
            self._bar.update(self._task, completed=self._step, left=self._left)  # a thread of its own draws it

    def line(self) -> None:
        """The figures of the last step as a line that stays, where there is no live display."""
        if self._live is None:
            line = f"step {self._step:,}/{self._total:,}  {self._figures}  {self._left}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        """From the time that this process took for its steps, evaluations and checkpoints included."""
        a_step = (time.perf_counter() - self._began) / max(1, step - self._first)
        return f"{timedelta(seconds=round(a_step * max(0, self._total - step)))} left"

    def _block(self) -> RenderableType:
        lines = [Text(line) for line in (self._figures, self._evaluation, self._doing) if line]
        return Group(self._bar, *lines)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()


def size(count: float) -> str:
    """Bytes as people read them: 512 MiB, 1.9 GiB."""
    if count < 1 << 30:
        return f"{count / (1 << 20):,.0f} MiB"
    return f"{count / (1 << 30):,.1f} GiB"
