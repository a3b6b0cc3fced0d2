"""Encoded rows into the tensors of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .encode import IGNORED, Encoded


@dataclass
class PaddingCollator:
    """Rows (length,) into a batch (rows, longest), padded on the right; padding is masked and not trained."""

    pad_id: int

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        ids, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        mask = padded([[1] * len(row) for row in ids], 0)
        return {"input_ids": padded(ids, self.pad_id), "attention_mask": mask, "labels": padded(labels, IGNORED)}


def padded(rows: Sequence[list[int]], value: int, left: bool = False) -> Tensor:
    """(rows, longest), padded on the right, or on the left so that all rows end at one column."""
    side = "left" if left else "right"
    return pad_sequence([torch.tensor(row) for row in rows], True, value, padding_side=side)
