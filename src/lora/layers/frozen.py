"""Quantized linears of a model that carries adapters: what they compute with gradients is ours, whether adapted or not.

With gradients, bitsandbytes would quantize the activations of an int8 linear and keep copies of them, and dequantize a
4-bit one in three launches. Here the product is with the dequantized weight, forward and backward. In eval mode
without gradients a call goes to bitsandbytes' own forward where that is what people deploy: LLM.int8() with its
outliers, and the fused 4-bit products for few rows.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bases.weight import FrozenWeight, weight_kind, weight_of
from ..ops import as_dtype
from ..ops.frozen_linear import frozen_linear
from .host import LoraLayer, acting_class, adapters_of, base_modules, original_class, take_class

FEW = 64
"""Rows up to which bitsandbytes' fused 4-bit products, which never write the dense weight, are the faster ones."""


class FrozenLinear(LoraLayer):
    """A quantized linear on which no adapter acts."""

    weight_kind: ClassVar[Callable[[nn.Module], FrozenWeight]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        kind = weight_kind(cls)  # once a class, and not at each call
        assert kind is not None
        cls.weight_kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return frozen_product(self, type(self).weight_kind(self), x)


def by_bitsandbytes(host: nn.Module, weight: FrozenWeight, x: Tensor) -> bool:
    """Whether the base's product is left to bitsandbytes' own forward."""
    if torch.is_grad_enabled() or host.training:
        return False  # in training mode even without gradients: reentrant checkpointing runs so at first
    # On a CPU its 4-bit forward repacks the weight in place and rounds the scales.
    return weight.quantization == "int8" or (x.is_cuda and x.numel() <= FEW * x.shape[-1])


def frozen_product(host: nn.Module, weight: FrozenWeight, x: Tensor) -> Tensor:
    """W0 x + bias, (..., out), in the dtype that the module's own forward gives."""
    bias = host._parameters["bias"]
    if by_bitsandbytes(host, weight, x):
        kept = None if bias is None else bias.data
        y: Tensor = original_class(host).forward(host, x)
        if bias is not None and kept is not None and bias.dtype != kept.dtype:
            bias.data = kept  # bitsandbytes casts it to x's dtype in place
        return y
    dtype = weight.compute_dtype(x)
    y = frozen_linear(as_dtype(x, dtype), *weight.stored(), None if bias is None else as_dtype(bias, dtype))
    return as_dtype(y, weight.output_dtype(x))


def settle(root: nn.Module, carries: bool) -> None:
    """Give the quantized linears that have no adapter the class that fits a model that carries adapters, or not."""
    for _, module in base_modules(root):
        if adapters_of(module) is None and is_quantized(module):
            original: Any = original_class(module)
            own = next(c for c in original.__mro__ if c.__module__.startswith("bitsandbytes."))
            if original.forward is not own.forward:
                continue  # what it computes is not known
            take_class(module, acting_class(FrozenLinear, original) if carries else original)


def is_quantized(module: nn.Module) -> bool:
    weight = weight_of(module)
    if weight is None or weight.quantization is None:
        return False
    state: Any = getattr(module, "state", None)  # Linear8bitLt's
    return not getattr(state, "has_fp16_weights", False)
