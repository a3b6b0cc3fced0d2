"""Prompts of another adapter for each row of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import LoraError
from ..updates import repeats
from .interface import Prompted


@dataclass(frozen=True)
class Rows:
    """Which of a host's acting adapters each row has: `index` (rows,), -1 for none. `rows`: as many as there are."""

    index: Tensor

    def choose(self, found: Sequence[Prompted], batch: int) -> tuple[Prompted, ...]:
        """Of what each acting adapter would have every row attend to, what each row does.

        Rows that generation repeats (beams, several answers of one row) have the adapter of theirs. Shorter prompts are
        filled up and masked. A row without an adapter has factors of zero, so that it is the base's to the bit.
        """
        if not found:
            return ()
        rows = len(self.index)
        if batch % rows or not (torch.compiler.is_compiling() or batch == rows * repeats()):
            raise LoraError(
                f"rows: {rows} rows are told of, and the batch has {batch}; one name or None for each row (generation "
                "repeats them itself, for its beams and num_return_sequences)"
            )
        index = self.index.repeat_interleave(batch // rows)
        longest = max(each.keys.shape[2] for each in found)
        lengths = torch.tensor([each.keys.shape[2] for each in found], device=index.device)
        keys, values = (
            torch.stack([_filled(tensor, batch, longest) for tensor in tensors])
            for tensors in ([each.keys for each in found], [each.values for each in found])
        )
        factors = torch.stack([each.factors.expand(batch, -1) for each in found])
        row, one = torch.arange(batch, device=index.device), index.clamp(min=0)
        mask = torch.arange(longest, device=index.device) < lengths[one][:, None]
        chosen = factors[one, row].masked_fill((index < 0)[:, None], 0.0)
        return (Prompted(keys[one, row], values[one, row], chosen, mask),)


def _filled(tensor: Tensor, batch: int, length: int) -> Tensor:
    """(1 or batch, heads, K, dim) as (batch, heads, length, dim), with zeros at the end."""
    return pad(tensor.expand(batch, -1, -1, -1), (0, 0, 0, length - tensor.shape[2]))
