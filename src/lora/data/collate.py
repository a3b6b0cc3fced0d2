"""Encoded rows into the tensors of a batch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .encode import IGNORED, Encoded


@dataclass
class PaddingCollator:
    """Rows (length,) into a batch (rows, longest), padded on the right; padding is masked and not trained."""

    pad_id: int

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        mask = padded([[1] * len(row) for row in ids], 0)
        labels = padded([_labels(row) for row in rows], IGNORED)
        return {"input_ids": padded(ids, self.pad_id), "attention_mask": mask, "labels": labels}


@dataclass
class PackingCollator:
    """Packs, each of several rows, into a batch in which no row sees another.

    Each pack is a row of the batch (packs, longest pack). What parts its rows for transformers' models, with eager,
    sdpa and flex attention, are positions that start again at 0, and that only where there is no attention_mask (one
    of ones alone would join the rows again) and no cache. All padding is at position 0: each token of it is a row of
    its own.

    `flat` is for flash attention, which takes no mask: there the batch is one row (1, all tokens) without padding,
    with the boundaries in `cu_seq_lens_q` and its like. With sdpa one row would cost the square of all packs together.

    No model is held to any of this: `lora.train.leaks.check_packing` tries it on the model itself.
    """

    pad_id: int
    flat: bool = False

    def __call__(self, packs: Sequence[Sequence[Encoded]]) -> dict[str, Any]:
        rows = [list(chain.from_iterable(packs))] if self.flat else packs
        batch: dict[str, Any] = {
            "input_ids": padded([_joined(row["input_ids"] for row in pack) for pack in rows], self.pad_id),
            "position_ids": padded([_joined(range(len(row["input_ids"])) for row in pack) for pack in rows], 0),
            "labels": padded([_joined(map(_labels, pack)) for pack in rows], IGNORED),
            "use_cache": False,
        }
        if self.flat:
            lengths = [len(row["input_ids"]) for row in rows[0]]
            ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return batch


def padded(rows: Sequence[list[int]], value: int, left: bool = False) -> Tensor:
    """(rows, longest), padded on the right, or on the left so that all rows end at one column."""
    side = "left" if left else "right"
    return pad_sequence([torch.tensor(row) for row in rows], True, value, padding_side=side)


def _labels(row: Encoded) -> list[int]:
    """The labels but for the first, which nothing in the row predicts: in a pack its neighbour would be trained to."""
    return [IGNORED, *row["labels"][1:]]


def _joined(parts: Iterable[Iterable[int]]) -> list[int]:
    return list(chain.from_iterable(parts))
