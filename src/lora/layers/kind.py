"""A kind of host: all that differs between a linear, an embedding, a module trained whole, and what comes after them.

The verbs (inject, load, save, merge, summary, ...) walk over hosts and ask; none of them knows a kind by name. A new
kind is one subclass, registered in the table below.
"""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import bases
from ..bases import FrozenWeight
from ..config import AdapterConfig, matches
from ..errors import near
from ..exact import How, MergedModule
from .host import Adapters, adapters_of, base_modules

KindT = TypeVar("KindT", bound="Kind")


class Part(NamedTuple):
    """One adapter's part, prepared for a host that may not carry it yet."""

    host: nn.Module
    kind: type["Kind"]
    module: Any


class Line(NamedTuple):
    """What the summary says of one part."""

    shape: tuple[int, ...]
    r: int | None
    parameters: int
    note: str = ""  # what it is, where that is no plain LoRA


class Kind(Adapters):
    """The adapters of one host, and what is true of every host of its kind."""

    supports: ClassVar[str] = ""  # the classes it takes, in words, where no frozen weight's format names them
    all_linear: ClassVar[bool] = False  # whether targets="all-linear" means its modules
    by_targets: ClassVar[bool] = True  # whether a part is on a module because `targets` picked it
    weight_is_seen: ClassVar[bool] = False  # whether who reads host.weight, and does not call the host, sees what acts
    halved: ClassVar[bool] = False  # whether a part is an update whose A sums over many features and whose B over few
    by_row: ClassVar[bool] = False  # whether each row of a batch may have the part of another adapter
    group: Any = None  # the hosts that are computed together with this one, where there are any
    quantization: str | None = None  # how the host's weight is quantized, where it is

    # Which modules.

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether `targets` may pick a module for this kind."""
        return False

    @classmethod
    def check(cls, model: nn.Module, name: str, module: nn.Module) -> None:
        """Raise LoraError, with the reason, where a module that it takes cannot carry an adapter as it is now."""

    # An adapter's part.

    @classmethod
    def parts(cls, root: nn.Module, targets: dict[str, nn.Module], config: AdapterConfig, loading: bool) -> list[Part]:
        """Fresh parts of this kind for a new adapter, nothing attached yet.

        Args:
            targets: full name and module of all that `targets` picked, of whichever kind.
            loading: a file will fill them, so nothing need be drawn, and names that fit nothing do no harm.
        """
        raise NotImplementedError

    @classmethod
    def trained(cls, part: Any) -> list[nn.Parameter]:
        """The parameters of a part that train."""
        return list(part.parameters())

    @classmethod
    def arrange(cls, hosts: Iterable[tuple[str, nn.Module, "Kind"]]) -> None:
        """Called with all hosts of this kind in a model once new ones have come."""

    def check_together(self, name: str, names: list[str]) -> None:
        """Raise LoraError where these adapters cannot act at once on this host."""

    def covers(self, adapter: str) -> bool:
        """Whether nothing inside the host runs while this adapter acts on it."""
        return False

    # In a file.

    @classmethod
    def tensors(cls, part: Any) -> dict[str, Tensor]:
        """A part's tensors by their keys in a file, which follow the host's full name and a dot."""
        raise NotImplementedError

    @classmethod
    def untie(cls, part: Any, key: str) -> None:
        """Give a part a tensor of its own in place of one that is tied to another's: a file parts the two."""
        raise NotImplementedError

    @classmethod
    def loads_as(cls, host: nn.Module, part: Any) -> str:
        """What a user should know of what a file's part does on this host; "" for nothing."""
        return ""

    @classmethod
    def weight(cls, host: nn.Module) -> FrozenWeight | None:
        """The frozen weight that an adapter here belongs to, of which a file keeps a fingerprint."""
        return None

    # Merged into the host.

    def check_merge(self, name: str, host: nn.Module, into: str | None) -> None:
        """Raise LoraError where the host's weight cannot take a merge."""

    def written(self, host: nn.Module) -> list[Tensor]:
        """The host's tensors that a merge writes to, which nobody else may hold."""
        return []

    def merged(self, name: str, host: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """What a merge of what acts would make of the host's parameters, by their names in it; nothing is written.

        dtype: of a linear that would take a quantized one's place; None: the weight's own.
        """
        raise NotImplementedError

    def merge(self, name: str, host: nn.Module, how: How) -> MergedModule:
        """Fold what acts into the host and set `undo`.

        It may fail or be interrupted anywhere: the verb gives modules their attributes and parameters back, and the
        base's tensors their memory. A kind that writes into that memory, or exchanges it with a part's, notes in
        `how.journal`, before, how to give the values back.
        """
        raise NotImplementedError

    def unmerge(self, name: str, host: nn.Module, how: How) -> None:
        """Give the host back what it had, to the bit, and clear `undo`; as for `merge`, if that fails."""
        raise NotImplementedError

    def leave(self, host: nn.Module) -> bool:
        """Forget the way back, before a merged host's adapters go. True: its weight is quantized no longer."""
        self.undo = None
        return False

    # In the summary.

    @classmethod
    def line(cls, part: Any) -> Line:
        raise NotImplementedError

    def runs(self, host: nn.Module, plain: torch.dtype | None) -> str:
        """How what acts on the host runs; `plain`: the dtype of the model's activations, where known."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What a reader of the summary should know beside the table."""
        return []


KINDS: list[type[Kind]] = []
"""Asked in this order, a kind registered later before those that came with the library."""


def register(kind: type[KindT]) -> type[KindT]:
    """Add a kind of host; as a decorator."""
    if kind not in KINDS:
        KINDS.insert(0, kind)
    return kind


def unregister(kind: type[Kind]) -> None:
    """Take it out of the table again; hosts that are of it stay as they are."""
    if kind in KINDS:
        KINDS.remove(kind)


def kind_of(module: nn.Module) -> type[Kind] | None:
    """The kind that takes a module as a target."""
    return next((kind for kind in KINDS if kind.takes(module)), None)


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Kind]]:
    """(full name, host, its adapters) for each module that carries adapters, once each, in the model's order."""
    for name, module in base_modules(model):
        found = adapters_of(module)
        if isinstance(found, Kind):
            yield name, module, found


def no_module(modules: dict[str, nn.Module], entry: str, known: Iterable[str]) -> str:
    """The end of an error: what a name is that fits no module, or names near to it."""
    for owner, module in modules.items():
        for name in module._parameters:
            if matches([entry], full := f"{owner}.{name}" if owner else name):
                whose = f"the {type(module).__name__} {repr(owner) if owner else 'itself'}"
                return f"; {full!r} is a parameter, and only modules can be named: it belongs to {whose}"
    return near(entry, filter(None, known))


def supported() -> str:
    """The classes that targets may pick, for errors."""
    return "; ".join([bases.supported(), *(kind.supports for kind in KINDS if kind.supports)])
