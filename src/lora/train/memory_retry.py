"""Out of memory in a step: its micro-batches halve, and it is done again from the same rows."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..errors import OutOfMemoryError
from .feed import Item

T = TypeVar("T")
_SIGNS = ("not enough memory", "can't allocate memory", "out of memory", "alloc_failed")
ADVICE = (
    "`lora estimate` says what the parts of a step take; gradient_checkpointing keeps fewer activations, a shorter "
    "max_length makes smaller ones, quantize shrinks the base"
)

SMALLER = (
    "The optimizer keeps two states for each parameter that trains: optimizer adamw_8bit or paged_adamw takes less of "
    "a GPU's memory for them, and a smaller r, or fewer targets, makes fewer; with these a run starts anew"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU, in one of its libraries, or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def told_apart(when: str) -> Iterator[None]:
    """Memory that runs out within it, where there is no step to take in smaller parts, is ours: `when` and why.

    Raises:
        OutOfMemoryError: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        why = str(error).partition("\n")[0]
        raise OutOfMemoryError(f"memory ran out {when} ({why}). {ADVICE}") from error


@dataclass
class MicroBatches:
    """How a step's rows are cut: `size` items each, and where one pack is still too large, in `parts` of it.

    say: tells the user, once for each halving.
    """

    size: int
    parts: int = 1
    say: Callable[[str], None] = lambda text: None

    def cut(self, items: Sequence[Item]) -> list[list[Item]]:
        """A step's items as micro-batches, the longest first: rows of like length share one, which saves padding.

        Which rows a step has, and so its gradient, is not changed by it.
        """
        if self.parts > 1:
            items = [piece for item in items for piece in _parts(item, self.parts)]
        items = sorted(items, key=_tokens, reverse=True)
        return [list(items[start : start + self.size]) for start in range(0, len(items), self.size)]

    def fit(self, items: Sequence[Item], step: int, attempt: Callable[[list[list[Item]]], T]) -> T:
        """`attempt` with the items' micro-batches, again with smaller ones while memory runs out.

        Args:
            attempt: begins each time as if it had not been called before.

        Raises:
            OutOfMemoryError: one row alone does not fit.
        """
        while True:
            try:
                return attempt(self.cut(items))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                why = str(error).partition("\n")[0]
            # Out of the handler, whose traceback holds the tensors of the failed step.
            gc.collect()
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.empty_cache()
            self._halve(items, step, why)

    def _halve(self, items: Sequence[Item], step: int, why: str) -> None:
        size = min(self.size, len(items))
        longest = max((len(item) for item in items if isinstance(item, list)), default=1)
        if size > 1:
            self.size = -(-size // 2)
            now = f"{self.size} rows at a time" if self.size > 1 else "one row at a time"
        elif self.parts < longest:
            self.size, self.parts = 1, self.parts * 2
            now = f"each pack in {self.parts} parts"
        else:
            tokens = max(map(_tokens, items))
            raise OutOfMemoryError(
                f"step {step}: one row of {tokens} tokens does not fit into memory ({why}). {ADVICE}"
            )
        self.say(f"step {step}: out of memory; from here on {now}, with as many rows a step as before")


def _rows(item: Item) -> list[Any]:
    return item if isinstance(item, list) else [item]


def _tokens(item: Item) -> int:
    return sum(len(row["input_ids"]) for row in _rows(item))


def _parts(item: Item, count: int) -> list[Item]:
    rows = _rows(item)
    if len(rows) < 2:
        return [item]
    size = -(-len(rows) // count)
    return [rows[start : start + size] for start in range(0, len(rows), size)]
