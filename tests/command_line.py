"""The `lora` command in the test's own process."""

import io
import sys
from collections.abc import Callable

import pytest

from lora.cli import main

Lora = Callable[..., tuple[int, str, str]]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lora:
    """A call that runs the command: (exit code, stdout, stderr). `stdin` is what is piped in."""
    monkeypatch.delenv("LORA_DEBUG", raising=False)

    def call(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return int(exit_.value.code or 0), printed.out, printed.err

    return call
