"""Who computes a call: `launch.py` with the kernels on the cards that they run on, `reference.py` elsewhere."""

import functools
from typing import Any

import torch
from torch import Tensor

from ..kernels.tuning import card
from . import reference, rehearsal
from .dequantize import has_triton
from .plan import why_plain


@functools.cache
def kernels_take(device: torch.device, element_size: int) -> bool:
    """Whether the kernels compute tensors of that size on a CUDA device."""
    return not why_plain(element_size, has_triton(), card(device).major)


def in_kernels(x: Tensor) -> bool:
    return x.is_cuda and kernels_take(x.device, x.element_size())


def form(x: Tensor) -> Any:
    """The module that computes a call with x. Both have `hidden`, `products` and `backward`."""
    if not in_kernels(x):
        return rehearsal.Launched if rehearsal.on_card(x) else reference
    from . import launch  # only now is triton needed

    return launch
