"""`operator.py`'s formulas, forward and backward, in plain torch: the CPU path and the oracle of `launch.py`."""

import torch
from torch import Tensor

from .call import Call, gradient_dtype, thin
from .philox import inverse_keep, keep_mask
from .recompute import Factors


def hidden(x: Tensor, call: Call) -> Tensor:
    """h (n, R), padded as `thin` has it."""
    rank = call.A.shape[0]
    h = thin(x, rank)
    h[:, :rank] = (_masked(x, call) @ call.A.t()) * _scale(call, x)
    return h


def products(x: Tensor, h: Tensor, call: Call, biases: list[Tensor]) -> list[Tensor]:
    """y_i (n, out_i)"""
    ys = []
    for i, (b, part) in enumerate(zip(call.B, call.columns(), strict=True)):
        y = torch.nn.functional.linear(x, call.matrices[i], biases[i] if biases else None)
        ys.append(y.addmm_(h[:, part], b.t()))
    return ys


def backward(dys: list[Tensor], x: Tensor | Factors, h: Tensor, call: Call, needs_dx: bool) -> list[Tensor]:
    """[dA, dB_i ..., dx if needed]"""
    x = x.product() if isinstance(x, Factors) else x
    dtype = gradient_dtype(x)
    g = torch.cat([dy @ b for dy, b in zip(dys, call.B, strict=True)], 1)
    g = (g * _scale(call, x)).to(x.dtype)
    dA = (g.t() @ _masked(x, call)).to(dtype)
    dBs = [(dy.t() @ h[:, part]).to(dtype) for dy, part in zip(dys, call.columns(), strict=True)]
    if not needs_dx:
        return [dA, *dBs]
    dx = _masked(g @ call.A, call)
    for i, dy in enumerate(dys):
        dx = dx.addmm_(dy, call.matrices[i])
    return [dA, *dBs, dx]


def _masked(x: Tensor, call: Call) -> Tensor:
    return x if call.seed is None else x * keep_mask(call.seed, x.shape[0], x.shape[1], call.dropout)


def _scale(call: Call, like: Tensor) -> Tensor:
    return (call.scales * (1.0 if call.seed is None else inverse_keep(call.dropout))).to(gradient_dtype(like))
