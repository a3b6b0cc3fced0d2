"""Plain LoRA (Hu et al., 2021, arXiv:2106.09685): W = W0 + s B A."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..bases import FrozenWeight
from .update import Pair, Start, Update, register

LowRankT = TypeVar("LowRankT", bound="LowRank")


@register
class LowRank(Update):
    """A (r, in) and B (out, r), fp32, and the trained bias (out,) or None."""

    name = "lora"

    def __init__(self, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0, bias: Tensor | None = None) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.scaling = scaling
        self.dropout = dropout

    @classmethod
    def fresh(cls: type[LowRankT], weight: FrozenWeight, start: Start) -> LowRankT:
        out_features, in_features = weight.shape
        device = weight.device
        if start.init is None and device.type == "meta":
            device = torch.device("cpu")
        A = torch.empty(start.r, in_features, device=device, dtype=torch.float32)
        B = torch.empty(out_features, start.r, device=device, dtype=torch.float32)
        if start.init is not None:
            init_(A, B, start.init, start.zero)
        return cls(A, B, start.scaling, start.dropout)

    def pairs(self) -> tuple[Pair]:
        own = self._parameters  # quicker than attributes, in each forward pass
        return ((own["A"], own["B"], self.scaling),)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        out_features, in_features = self.B.shape[0], self.A.shape[1]
        return f"in={in_features}, out={out_features}, r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def init_(A: Tensor, B: Tensor, method: str, zero: str = "B") -> None:
    """Fill A (r, in) and B (out, r), one of them with zeros, so that a fresh update changes nothing.

    B at zero: A is "gaussian", N(0, 1/r) by standard deviation, or "kaiming", as nn.Linear starts its weight. A at
    zero, as loralib starts embeddings, so that a token that is never seen stays the base's own: B is N(0, 1).
    """
    nn.init.zeros_(A if zero == "A" else B)
    if zero == "A":
        nn.init.normal_(B)
    elif method == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
