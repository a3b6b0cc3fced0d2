"""The `lora` command: runs the app, and turns an error that the user can put right into one message."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from .errors import LoraError

_PARTS = ("typer", "click", "rich", "pydantic", "torch", "transformers", "accelerate", "datasets", "pyarrow", "yaml")
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main() -> None:
    """Entry point of the `lora` script.

    Exit codes: 0 done, 1 a part is not installed, 2 to 6 an error's own (2 for a usage error too), 128 and the
    signal's number where a signal ended it: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
    """
    debug = os.environ.get("LORA_DEBUG", "") not in ("", "0")
    if "--debug" in sys.argv[1:]:
        # Taken out here, so that it works before and after the command's name.
        sys.argv.remove("--debug")
        debug = True
    # Read when torch loads. Threads that wait for one another ought to sleep: where others use the cores as well,
    # those that spin take the time of the one they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with _ended_by_signals() as ending:
        try:
            ending.at_once = True
            from .commands import app

            ending.at_once = False
            app(prog_name="lora")
        except LoraError as error:
            if debug:
                raise
            _print_error(str(error))
            sys.exit(error.exit_code)
        except ModuleNotFoundError as error:
            if debug or error.name not in _PARTS:
                raise
            print(f"lora: the command needs {error.name}; pip install 'lora-torch[train]'", file=sys.stderr)
            sys.exit(1)
        except BaseException:
            if ending.number is None or debug:
                raise
            ending.say_and_exit()  # whatever the exception became on its way


class Ending:
    """Signals that ask the command to end, as an exception; `at_once` while nothing is under way that it would undo."""

    def __init__(self) -> None:
        self.at_once = False
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if self.at_once:  # an import that is interrupted half-way may tell of anything
            _print_error("interrupted")
            os._exit(128 + number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def say_and_exit(self) -> NoReturn:
        _print_error("interrupted")
        sys.exit(128 + (self.number or signal.SIGINT))


@contextmanager
def _ended_by_signals() -> Iterator[Ending]:
    """Within it, each signal that would end the process with a traceback or no word is an `Ending`'s.

    One that is ignored, as under nohup, stays so.
    """
    ending = Ending()
    before: dict[int, Any] = {}
    try:
        for number in _SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, ending)
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_error(message: str) -> None:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{red}error: {message}{plain}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
