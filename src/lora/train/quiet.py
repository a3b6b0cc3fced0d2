"""Keeps transformers from printing its own bars, tables and notices over ours."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Within it, transformers reports errors only and, unless `bars`, draws none; the caller's settings come back."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not bars:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
