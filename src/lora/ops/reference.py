# mypy: disable-error-code="no-untyped-call"
# Some of torch's functions carry no types.
"""lora_linear for several linears of one input, forward and backward: the plain-torch form, and the choice on CUDA.

The plain-torch form is the CPU path and the oracle; `operator.py` has the formulas and the autograd around it.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .dequantize import Packed, has_triton, layout
from .philox import inverse_keep, keep_mask, threshold
from .recompute import Factors


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
            end = start + layout(text).tensors
            self.packed.append(Packed(tensors[start:end], text))
            start = end

    def rows(self, target: int) -> int:
        """The matrix's out."""
        return self.packed[target].form.shape[0] if self.packed else self.tensors[target].shape[0]

    def __getitem__(self, target: int) -> Tensor:
        return self.packed[target].dense(self.dtype) if self.packed else self.tensors[target]


def _columns(B: list[Tensor]) -> list[int]:
    return [b.shape[1] for b in B]


def _masked(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    return x if seed is None else x * keep_mask(seed, x.shape[0], x.shape[1], dropout)


def gradient_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _scale(scales: Tensor, dropout: float, seed: Tensor | None, like: Tensor) -> Tensor:
    return (scales * (1.0 if seed is None else inverse_keep(dropout))).to(gradient_dtype(like))


def reference_hidden(x: Tensor, A_cast: Tensor, scales: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """h (n, R), its rows padded to a multiple of 8."""
    rank = A_cast.shape[0]
    h = x.new_zeros(x.shape[0], -(-rank // 8) * 8)
    h[:, :rank] = (_masked(x, dropout, seed) @ A_cast.t()) * _scale(scales, dropout, seed, x)
    return h


def reference_products(
    x: Tensor, h: Tensor, matrices: Matrices, biases: list[Tensor], B_cast: list[Tensor]
) -> list[Tensor]:  # fmt: skip
    ys, start = [], 0
    for i, b in enumerate(B_cast):
        y = torch.nn.functional.linear(x, matrices[i], biases[i] if biases else None)
        ys.append(y.addmm_(h[:, start : start + b.shape[1]], b.t()))
        start += b.shape[1]
    return ys


def reference_backward(
    dys: list[Tensor], x: Tensor, factor: Tensor | None, silu: bool, h: Tensor, matrices: Matrices, A_cast: Tensor,
    B_cast: list[Tensor], scales: Tensor, dropout: float, seed: Tensor | None, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    if factor is not None:
        x = Factors(x, factor, silu).product()
    rank, dtype = A_cast.shape[0], gradient_dtype(x)
    g = torch.cat([dy @ b for dy, b in zip(dys, B_cast, strict=True)], 1)
    g = (g * _scale(scales, dropout, seed, x)).to(x.dtype)
    dA = (g.t() @ _masked(x, dropout, seed)).to(dtype)
    parts = h[:, :rank].split(_columns(B_cast), 1)
    dBs = [(dy.t() @ part).to(dtype) for dy, part in zip(dys, parts, strict=True)]
    if not needs_dx:
        return [dA, *dBs]
    dx = _masked(g @ A_cast, dropout, seed)
    for i, dy in enumerate(dys):
        dx = dx.addmm_(dy, matrices[i])
    return [dA, *dBs, dx]


# With the kernels, where they run.


@functools.cache
def has_matrix_units(device: torch.device) -> bool:
    """Whether the GPU is an Ampere or later; for older ones the plain-torch form is as good, on cuBLAS."""
    return torch.cuda.get_device_capability(device)[0] >= 8


def _in_triton(x: Tensor) -> bool:
    return x.is_cuda and x.element_size() == 2 and has_triton() and has_matrix_units(x.device)


def _dropout_numbers(dropout: float, seed: Tensor | None) -> tuple[float, Tensor | None, int]:
    return (1.0, None, 0) if seed is None else (inverse_keep(dropout), seed, threshold(dropout))


def as_rows(t: Tensor) -> Tensor:
    """As the kernels read it: unit column stride, rows apart by at least their length."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def hidden(x: Tensor, A_cast: Tensor, scales: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    if not _in_triton(x):
        return reference_hidden(x, A_cast, scales, dropout, seed)
    from ..kernels import linear

    with torch.cuda.device_of(x):
        return linear.hidden(as_rows(x), A_cast, scales, *_dropout_numbers(dropout, seed))


def products(
    x: Tensor, h: Tensor, matrices: Matrices, biases: list[Tensor], B_cast: list[Tensor]
) -> list[Tensor]:  # fmt: skip
    if not _in_triton(x):
        return reference_products(x, h, matrices, biases, B_cast)
    from ..kernels import linear

    with torch.cuda.device_of(x):
        return linear.products(as_rows(x), h, matrices, biases, B_cast)


def backward(
    dys: list[Tensor], x: Tensor, factor: Tensor | None, silu: bool, h: Tensor, matrices: Matrices, A_cast: Tensor,
    B_cast: list[Tensor], scales: Tensor, dropout: float, seed: Tensor | None, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """[dA, dB_i ..., dx if needed]; x is silu(x) * factor, or x * factor, where there is one."""
    if not _in_triton(x):
        return reference_backward(dys, x, factor, silu, h, matrices, A_cast, B_cast, scales, dropout, seed, needs_dx)
    from ..kernels import linear

    with torch.cuda.device_of(x):
        return linear.backward(
            [as_rows(dy) for dy in dys], as_rows(x), factor, silu, h, matrices, A_cast, B_cast, scales,
            *_dropout_numbers(dropout, seed), needs_dx,
        )  # fmt: skip
