"""What one call of several linears of one input computes with: a frozen value, flat in the operator's schema alone."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dequantize import Packed, layout


class Matrices:
    """The weights W_i of one call, by target; a quantized one is dense only while the caller holds it.

    Args:
        tensors: what stores them, one after the other; formats: their `dequantize.Layout`s, joined by ";", or "" where
            each is a plain matrix; dtype: of the matrices.
    """

    def __init__(self, tensors: Sequence[Tensor], formats: str, dtype: torch.dtype) -> None:
        self.tensors, self.dtype = tensors, dtype
        self.packed: list[Packed] = []
        start = 0
        for text in formats.split(";") if formats else ():
            end = start + len(layout(text).parts)
            self.packed.append(Packed(tensors[start:end], text))
            start = end

    def __getitem__(self, target: int) -> Tensor:
        return self.packed[target].dense(self.dtype) if self.packed else self.tensors[target]


class Call(NamedTuple):
    """Beside x and dy. A, B and scales are copies of the fp32 masters, made once for both passes."""

    matrices: Matrices
    A: Tensor  # (R, in), the targets' ranks one after the other, each target's adapters one after the other
    B: list[Tensor]  # (out_i, R_i) for each target
    scales: Tensor  # (R,) fp32
    dropout: float
    seed: Tensor | None  # of the dropout mask, int64 of one element; None for no dropout

    def columns(self) -> list[slice]:
        """The columns of h (n, R) that belong to each target."""
        ends = itertools.accumulate([b.shape[1] for b in self.B], initial=0)
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def widest(self) -> int:
        """The target with the most outputs."""
        return max(range(len(self.B)), key=lambda i: self.B[i].shape[0])


def thin(x: Tensor, rank: int) -> Tensor:
    """A buffer for (n, R) values whose rows start on 16 bytes, as TMA wants: zeros pad R to a multiple of 8."""
    padded = -(-rank // 8) * 8
    return (x.new_empty if padded == rank else x.new_zeros)(x.shape[0], padded)


def gradient_dtype(x: Tensor) -> torch.dtype:
    """What gradients of the masters are summed in."""
    return torch.promote_types(x.dtype, torch.float32)


def as_rows(t: Tensor) -> Tensor:
    """As the kernels read it: unit column stride, rows apart by at least their length."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()
