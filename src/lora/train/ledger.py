"""The memory that tensors hold from operation to operation, counted by their storages: on any device, meta too."""

import itertools
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes: what CUDA's caching allocator rounds to
LARGE, SEGMENT = 10 << 20, 2 << 20
"""Above `LARGE` a block has a segment of its own, of whole `SEGMENT`s, and keeps a rest of half of one or less."""


def rounded(size: int) -> int:
    """What the caching allocator takes for so many bytes."""
    blocks = -(-size // BLOCK) * BLOCK
    segments = -(-size // SEGMENT) * SEGMENT
    return segments if size >= LARGE and segments - blocks <= SEGMENT // 2 else blocks


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, each new storage is written down with what made it, and struck out when its memory is free.

    What the operations allocate within themselves is not seen.

    Args:
        card: round as the caching allocator of a card does.
    """

    def __init__(self, card: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.card = card
        self.made_by: list[str] = []  # by storage, in the order in which they came
        self.sizes: list[int] = []
        self.events: list[tuple[int, bool]] = []  # (storage, whether it came or went)
        self.marks: list[tuple[int, str]] = []  # (number of events before it, the moment that begins)
        self.part = ""  # what makes the storages that come now
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}  # by address; -1: not counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf, counted=True)
        return out

    def leave_out(self, tensors: Iterable[Tensor | None]) -> None:
        """What is there already and is counted elsewhere."""
        for tensor in tensors:
            if tensor is not None:
                self._see(tensor, counted=False)

    def name(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Say what storages that are counted are, in place of what made them."""
        for tensor in tensors:
            number = self._alive.get(tensor.untyped_storage()._cdata, (None, -1))[1]
            if number >= 0:
                self.made_by[number] = part

    def mark(self, moment: str) -> None:
        self.marks.append((len(self.events), moment))

    def _see(self, tensor: Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        number = -1
        if counted and storage.nbytes():
            number = len(self.sizes)
            self.sizes.append(rounded(storage.nbytes()) if self.card else storage.nbytes())
            self.made_by.append(self.part)
            self.events.append((number, True))

        def gone(_: Any) -> None:
            del self._alive[address]
            if number >= 0:
                self.events.append((number, False))

        self._alive[address] = weakref.ref(storage, gone), number

    def peaks(self) -> dict[str, "Peak"]:
        """By moment, in their order, the most that was held within it and what it was; a moment that comes again is
        one with its first."""
        found: dict[str, Peak] = {}
        held: Counter[str] = Counter()
        total = 0
        ends = [*(start for start, _ in self.marks[1:]), len(self.events)]
        for (start, moment), end in zip(self.marks, ends, strict=True):
            best = found.setdefault(moment, Peak(total, dict(held)))
            for number, came in itertools.islice(self.events, start, end):
                size = self.sizes[number] if came else -self.sizes[number]
                total += size
                held[self.made_by[number]] += size
                if total > best.total:
                    best.total, best.parts = total, dict(held)
        return found


class Peak:
    """total: bytes; parts: of what."""

    def __init__(self, total: int, parts: dict[str, int]) -> None:
        self.total, self.parts = total, parts


def tensors_of(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a model, each storage once."""
    by_storage = {t.untyped_storage()._cdata: t for t in itertools.chain(model.parameters(), model.buffers())}
    return list(by_storage.values())
