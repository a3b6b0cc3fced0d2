"""The `lora` command: runs the app, and turns an error that the user can put right into one message."""

import os
import sys

from .errors import LoraError

_PARTS = ("typer", "click", "rich", "pydantic", "torch", "transformers", "accelerate", "datasets", "pyarrow", "yaml")


def main() -> None:
    """Entry point of the `lora` script. Exit codes: 0 done, 1 a part is not installed, an error's own, 130 Ctrl-C."""
    debug = os.environ.get("LORA_DEBUG", "") not in ("", "0")
    if "--debug" in sys.argv[1:]:
        # Taken out here, so that it works before and after the command's name.
        sys.argv.remove("--debug")
        debug = True
    try:
        from .commands import app

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
    except KeyboardInterrupt:
        _print_error("interrupted")
        sys.exit(130)


def _print_error(message: str) -> None:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{red}error: {message}{plain}", file=sys.stderr)


if __name__ == "__main__":
    main()
