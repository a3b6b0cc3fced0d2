"""What a merge is told, what it must remember, and the checks around it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import LoraError


@dataclass(kw_only=True)
class Undo:
    """What one host needs to be unmerged. None in its place: the host is not merged."""

    merged_class: type[nn.Module] | None = None  # the host's while merged; None for the one that it has at rest
    into: str | None = None  # what a quantized weight was quantized into again; None for anything else


class Journal(dict[nn.Module, Callable[[], None]]):
    """How hosts and parts get back the values that a merge writes or exchanges: noted before the first write.

    An entry may be called again after an interrupt in it.
    """

    def back(self) -> None:
        while self:
            host = next(reversed(self))
            self[host]()
            self.pop(host, None)


@dataclass
class How:
    """How all hosts of one merge or unmerge are treated.

    journal: of the verb, for kinds that write values in place or exchange them with a part's.

    into: as `lora.merge` has it. dtype: of a linear that takes a quantized one's place; None: the weight's own.
    exchanged: ids of the tensors whose values were exchanged already, for tensors that are tied.
    """

    journal: Journal
    into: str | None = None
    dtype: torch.dtype | None = None
    exchanged: set[int] = field(default_factory=set)


def refuse_overflow(name: str, values: torch.Tensor, stored: str | None = None) -> None:
    """`stored`: how the values are held, where that is not their dtype."""
    if not torch.isfinite(values).all():
        held = stored or str(values.dtype).removeprefix("torch.")
        raise LoraError(
            f"model: merging {name!r} gives NaN or infinity in {held}; nothing was changed. The "
            "base's weight has such values already, or the sum is too large for the dtype: then merge into a float32 "
            "copy"
        )


def changed(name: str, dtype: torch.dtype, before: torch.dtype | None) -> LoraError:
    was = "" if before in (None, dtype) else f"was {before} and "
    return LoraError(
        f"model: {name!r} cannot be unmerged: its weight, bias or adapter changed after the merge (trained, loaded or "
        f"cast; it {was}is {dtype}). Put the values back, or load the base model again"
    )
