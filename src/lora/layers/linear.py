"""The low-rank update of a linear map."""

from typing import Any

import torch
from torch import Tensor, nn

from ..bases import FrozenWeight, weight_of
from ..errors import LoraError
from ..ops import lora_linear, summed_bias
from ..updates.start import init_
from . import groups
from .frozen import FrozenLinear
from .host import Adapters, LoraLayer


class LowRank(nn.Module):
    """One adapter's part on one linear: A (r, in) and B (out, r), fp32, and the trained bias (out,) or None."""

    bias: Tensor | None

    def __init__(self, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0, bias: Tensor | None = None) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.scaling = scaling
        self.dropout = dropout

    @classmethod
    def fresh(cls, weight: FrozenWeight, r: int, scaling: float, dropout: float, init: str | None) -> "LowRank":
        """A new part for a weight, on its device: A drawn and B zero, or both to be filled when `init` is None.

        A part to be filled is never on the meta device, so that an adapter can come before its base's weights.
        """
        out_features, in_features = weight.shape
        device = weight.parameter.device
        if init is None and device.type == "meta":
            device = torch.device("cpu")
        A = torch.empty(r, in_features, device=device, dtype=torch.float32)
        B = torch.empty(out_features, r, device=device, dtype=torch.float32)
        if init is not None:
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

    def forward(self, x: Tensor) -> Tensor:
        # Straight from the dicts: nn.Module's attribute lookup costs a microsecond for each parameter or child,
        # and all of them together would double the time of a small call.
        adapters: Any = self._modules["lora"]
        if "_is_replica" in self.__dict__:
            raise LoraError("model: nn.DataParallel is not supported; use DistributedDataParallel or one GPU")
        if x.device.type in groups.DEVICES or adapters.quantized:
            y = groups.run(self, adapters, x)
            if y is not None:
                return y
        bias: Tensor | None = self._parameters["bias"]
        training = self.training
        updates, own_bias = [], False
        for term in adapters.terms:
            own = term._parameters
            updates.append((own["A"], own["B"], term.scaling, term.dropout if training else 0.0))
            own_bias = own_bias or own["bias"] is not None
        if own_bias:
            bias = summed_bias(bias, adapters.terms)
        return lora_linear(x, adapters.frozen.dense(), bias, updates)


class LinearAdapters(Adapters):
    """The adapters of a module that computes W0 x + bias."""

    layer = LoraLinear
    terms: tuple[LowRank, ...]

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        weight = weight_of(host)
        assert weight is not None, type(host)
        self.frozen = weight
        self.quantized = weight.quantization is not None
        if self.quantized:
            self.resting_layer = FrozenLinear
        self.group: Any = None  # the hosts that are fed the same tensor, where there are any
