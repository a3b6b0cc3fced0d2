"""How the commands speak: progress and notices on stderr, results on stdout."""

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..errors import LoraWarning


def stderr() -> Console:
    """The console for progress. Off a terminal its lines are not wrapped, so that logs can be searched."""
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty())


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Within it, a signal ends the command there and then: for imports, which have nothing to put back."""
    handlers = {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ending = [handler for handler in handlers if hasattr(handler, "at_once")]  # `lora.cli.Ending`
    for each in ending:
        each.at_once = True  # type: ignore[union-attr]
    try:
        yield
    finally:
        for each in ending:
            each.at_once = False  # type: ignore[union-attr]


@contextmanager
def clean_warnings() -> Iterator[None]:
    """Within it, our own warnings are one line each, once, without a source position; others stay silent."""

    told: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if str(message) in told:  # of the rows, which are looked at before anything heavy is loaded, and read again
            return
        told.add(str(message))
        stderr().print(f"[yellow]note:[/] {escape(str(message))}", highlight=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LoraWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield
