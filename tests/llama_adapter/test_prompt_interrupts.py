"""A Ctrl-C anywhere in `rows` and `condition`: what acted before the block acts after it, whichever line it struck."""

import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import lora
from lora import llama_adapter
from lora.layers import hosts
from tiny_decoders import adapted, llama, parts

LIBRARY = Path(lora.__file__).parent
WITHIN = tuple(str(LIBRARY / name) for name in ("llama_adapter", "atomic.py"))


def state(model: Any) -> list[Any]:
    found = [(a.active, a.row_names, a.rows, type(host)) for _, host, a in hosts(model)]
    return [*found, *(part.condition for part in parts(model))]


@pytest.mark.parametrize("verb", ["rows", "condition"])
def test_an_interrupt_at_any_line_leaves_no_block_behind(verb: str) -> None:
    model = adapted(adapted(llama(num_hidden_layers=1), layers=1, features=(3, 8)), name="plain", layers=1)
    features, before = torch.zeros(2, 3, 8), state(model)
    blocks: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "rows": lambda: llama_adapter.rows(model, ["default", None]),
        "condition": lambda: llama_adapter.condition(model, features, "default"),
    }

    def struck(n: int) -> list[tuple[str, int]]:
        """The lines that ran, until a Ctrl-C came at the n-th."""
        lines: list[tuple[str, int]] = []

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            if not frame.f_code.co_filename.startswith(WITHIN):
                return None
            if event == "line":
                lines.append((frame.f_code.co_filename, frame.f_lineno))
                if len(lines) == n:
                    signal.raise_signal(signal.SIGINT)
            return trace

        outer = sys.gettrace()
        sys.settrace(trace)
        try:
            with blocks[verb]():
                pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(outer)
        return lines

    lines = struck(0)
    # the first time and the last that each line runs
    steps = {*{line: n for n, line in enumerate(lines, 1)}.values(), *(lines.index(line) + 1 for line in {*lines})}
    assert len(steps) > 50
    for n in sorted(steps):
        ran = struck(n)
        assert state(model) == before, ran[n - 1]
