"""Keeps transformers and bitsandbytes from printing their own bars, tables and notices over ours."""

import logging as python_logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Within it, the two report errors only and, unless `bars`, draw none; the caller's settings come back."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    bitsandbytes = python_logging.getLogger("bitsandbytes")
    its_level = bitsandbytes.level
    bitsandbytes.setLevel(python_logging.ERROR)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not bars:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        bitsandbytes.setLevel(its_level)
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
