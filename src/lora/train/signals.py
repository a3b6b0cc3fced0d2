"""Ctrl-C, SIGTERM and SIGHUP: the step is finished, its state is saved, and the run stops."""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerState

from ..errors import Stopped

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_ONE_PRESS = 0.5  # seconds: a terminal's group and a wrapper around us may both pass one on
_FORCES = 3  # presses that do not wait any longer


class Signals:
    """Where a run may stop, it stops at once; where it may not (`waiting`), it is told at the next end of a step.

    received: the first signal, 0 for none. To be used by one run at a time, in the main thread; elsewhere signals are
    somebody else's.
    """

    def __init__(self) -> None:
        self.received = 0
        self._presses, self._last, self._waits = 0, -_ONE_PRESS, 0

    @contextmanager
    def listening(self) -> Iterator["Signals"]:
        """Within it, the signals are ours."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [number for name in _NAMES if (number := _number(name))]
        # One that is ignored, as SIGHUP is under nohup, stays so.
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                # None: it was set by something that is not python.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it, a signal waits, and so does a second; a third does not."""
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1

    def check(self) -> None:
        """Raises `Stopped` where a signal came meanwhile."""
        if self.received:
            raise self.stopped()

    def stopped(self, kept: str = "Nothing was saved on the way out") -> Stopped:
        """The end of a run that was stopped; `kept` is what is left of it."""
        number = self.received or int(signal.SIGINT)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        return Stopped(number, f"stopped by {name}. {kept}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._presses += now - self._last > _ONE_PRESS
        self._last = now
        first, self.received = not self.received, self.received or number
        if not self._waits or self._presses >= _FORCES:
            raise self.stopped()
        if first and sys.stderr.isatty():  # not by print: this may have come amid one
            os.write(sys.stderr.fileno(), b"\nfinishing this step, then saving; twice more stops at once\n")


class StopAtStep(TrainerCallback):
    """Ends the training after the step in which a signal came."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.signals.received:
            control.should_training_stop = True


def resume_command(recipe: Path, options: str = "--resume auto") -> str:
    """What goes on with a run, to be typed where the run was started."""
    return f"lora train {shlex.quote(str(recipe))} {options}"


def _number(name: str) -> int:
    return int(getattr(signal, name, 0))
