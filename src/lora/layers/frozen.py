"""Quantized linears of a model that carries adapters: what they compute with gradients is ours, whether adapted or not.

The product is with the dequantized weight, forward and backward; where the module's own forward is the better one
without gradients, its format says so.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bases import FrozenWeight, is_quantized, keeps_forward, weight_kind
from ..ops import as_dtype
from ..ops.frozen_linear import frozen_linear
from .host import LoraLayer, adapters_of, base_modules, original_class, take_layer


class FrozenLinear(LoraLayer):
    """A quantized linear on which no adapter acts."""

    weight_kind: ClassVar[Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.weight_kind = weight_kind(cls)  # once a class, and not at each call

    def forward(self, x: Tensor) -> Tensor:
        return frozen_product(self, type(self).weight_kind(self), x)


def frozen_product(host: nn.Module, weight: FrozenWeight, x: Tensor) -> Tensor:
    """W0 x + bias over a quantized weight, (..., out), in the dtype that the module's own forward gives."""
    if weight.runs_own_forward(host, x):
        return weight.own_forward(host, original_class(host), x)
    bias, dtype = host._parameters["bias"], weight.compute_dtype(x)
    y = frozen_linear(as_dtype(x, dtype), *weight.stored(), None if bias is None else as_dtype(bias, dtype))
    return as_dtype(y, weight.output_dtype(x))


def settle(root: nn.Module, carries: bool) -> None:
    """Give the quantized linears that have no adapter the class that fits a model that carries adapters, or not."""
    for _, module in base_modules(root):
        # What a class with a forward of its own computes is not known.
        if adapters_of(module) is None and is_quantized(module) and keeps_forward(original_class(module)):
            take_layer(module, FrozenLinear if carries else None)


def model_dtype(root: nn.Module) -> torch.dtype | None:
    """The dtype of a model's activations, as far as its parameters tell: 16 bits where any that is not quantized has 16
    bits, since norms, heads and biases may be held in more, and no float32 model holds any in less."""
    dtypes = []
    for _, module in base_modules(root):
        names = ["bias"] if is_quantized(module) else list(module._parameters)
        found = [module._parameters.get(name) for name in names]
        dtypes += [p.dtype for p in found if p is not None and p.is_floating_point()]
    return next((dtype for dtype in dtypes if dtype.itemsize == 2), dtypes[0] if dtypes else None)
