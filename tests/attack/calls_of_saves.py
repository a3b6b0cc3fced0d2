"""Count the calls to the filesystem that a save makes, and do something before the n-th: end the process, or fail."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacked_adapters import CONFIG, TENSORS

# Calls that raise no audit event.
UNHEARD = ("fsync", "fdatasync", "write", "pwrite")


def before_call(number: int, folder: Path, act: Callable[[str], Any]) -> Callable[[], int]:
    """Have `act(event)` run before the n-th call about the folder's files; returns how many calls there were.

    For a forked process: nothing takes the hook away. Calls are heard by their audit events, whoever makes them, and a
    few functions of `os` by a wrapper. Writes of other languages are not heard; a limit of the file size ends them.
    """
    seen = 0

    def hear(event: str) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            act(event)

    def hook(event: str, arguments: tuple) -> None:
        texts = [os.fsdecode(each) for each in arguments if isinstance(each, (str, bytes, os.PathLike))]
        about = any(str(folder) in text or TENSORS in text or CONFIG in text for text in texts)
        if event.startswith("fcntl.") or (about and event.startswith(("open", "os.", "shutil.", "tempfile."))):
            hear(event)

    for name in UNHEARD:
        setattr(os, name, _heard(name, getattr(os, name), hear))
    sys.addaudithook(hook)
    return lambda: seen


def _heard(name: str, real: Callable[..., Any], hear: Callable[[str], None]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        hear(f"os.{name}")
        return real(*arguments, **keywords)

    return call
