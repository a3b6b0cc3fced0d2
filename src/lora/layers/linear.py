"""The low-rank update of a linear map."""

import torch
from torch import Tensor, nn

from ..init import init_
from ..ops import lora_linear
from ..weights import FrozenWeight, weight_of
from .base import Adapters, LoraLayer


class LowRank(nn.Module):
    """One adapter's part on one linear: A (r, in) and B (out, r), fp32, and the trained bias (out,) or None."""

    bias: Tensor | None

    def __init__(
        self, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.scaling = scaling
        self.dropout = dropout

    @classmethod
    def fresh(cls, weight: FrozenWeight, r: int, scaling: float, dropout: float, init: str) -> "LowRank":
        """A new part for a weight, on its device (meta included): A drawn, B zero."""
        out_features, in_features = weight.shape
        device = weight.parameter.device
        A = torch.empty(r, in_features, device=device, dtype=torch.float32)
        B = torch.empty(out_features, r, device=device, dtype=torch.float32)
        init_(A, B, init)
        return cls(A, B, scaling, dropout)

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def extra_repr(self) -> str:
        out_features, in_features = self.B.shape[0], self.A.shape[1]
        return f"in={in_features}, out={out_features}, r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class LoraLinear(LoraLayer):
    """A linear while its adapters act."""

    bias: Tensor | None
    lora: "LinearAdapters"

    def forward(self, x: Tensor) -> Tensor:
        adapters, training = self.lora, self.training
        updates = [(t.A, t.B, t.scaling, t.dropout if training else 0.0) for t in adapters.terms]
        return lora_linear(x, adapters.frozen.dense(), shifted_bias(self.bias, adapters.terms), updates)


class LinearAdapters(Adapters):
    """The adapters of a module that computes W0 x + bias."""

    layer = LoraLinear
    terms: tuple[LowRank, ...]

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        weight = weight_of(host)
        assert weight is not None, type(host)
        self.frozen = weight


def shifted_bias(base: Tensor | None, terms: tuple[LowRank, ...]) -> Tensor | None:
    """base + sum of (trained - base) in fp32: the biases of several adapters add, a fresh one changes no bit."""
    trained = [t.bias for t in terms if t.bias is not None]
    if base is None or not trained:
        return base
    start = base.to(torch.promote_types(base.dtype, torch.float32))
    total = start
    for bias in trained:
        total = total + (bias - start)
    return total.to(base.dtype)
