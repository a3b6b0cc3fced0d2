"""Who computes a call: `launch.py` with the kernels on the cards that they run on, `reference.py` elsewhere."""

import functools

import torch
from torch import Tensor

from ..kernels.tuning import card
from . import reference
from .call import Call, as_rows
from .dequantize import has_triton
from .plan import why_plain
from .recompute import Factors


@functools.cache
def kernels_take(device: torch.device, element_size: int) -> bool:
    """Whether the kernels compute tensors of that size on a CUDA device."""
    return not why_plain(element_size, has_triton(), card(device).major)


def in_kernels(x: Tensor) -> bool:
    return x.is_cuda and kernels_take(x.device, x.element_size())


def hidden(x: Tensor, call: Call) -> Tensor:
    """h (n, R), padded as `thin` has it."""
    if not in_kernels(x):
        return reference.hidden(x, call)
    from . import launch

    with torch.cuda.device_of(x):
        return launch.hidden(as_rows(x), call)


def products(x: Tensor, h: Tensor, call: Call, biases: list[Tensor]) -> list[Tensor]:
    """y_i (n, out_i)"""
    if not in_kernels(x):
        return reference.products(x, h, call, biases)
    from . import launch

    with torch.cuda.device_of(x):
        return launch.products(as_rows(x), h, call, biases)


def backward(dys: list[Tensor], x: Tensor | Factors, h: Tensor, call: Call, needs_dx: bool) -> list[Tensor]:
    """[dA, dB_i ..., dx if needed]; dA and dB_i in at least fp32."""
    if not in_kernels(h):
        return reference.backward(dys, x, h, call, needs_dx)
    from . import launch

    with torch.cuda.device_of(h):
        x = x if isinstance(x, Factors) else as_rows(x)
        return launch.backward([as_rows(dy) for dy in dys], x, h, call, needs_dx)
