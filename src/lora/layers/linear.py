"""The linear map: `W0 x + bias`, stored as a matrix of any format."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..ops import add_updates_, lora_linear, summed_bias
from . import groups
from .frozen import FrozenLinear, frozen_product
from .host import LoraLayer
from .kind import Kind, register
from .matrix import MatrixKind, apart, refuse_replica, stretched
from .plan import plan


class LoraLinear(LoraLayer):
    """A linear while its adapters act."""

    def forward(self, x: Tensor) -> Tensor:
        # Straight from the dicts: nn.Module's attribute lookup costs a microsecond for each parameter or child,
        # and all of them together would double the time of a small call.
        adapters: Any = self._modules["lora"]
        refuse_replica(self)
        path, _ = plan(self, adapters, x)
        if path == "plain":
            y = _plain(self, adapters, x)
        elif path == "apart":
            y = _apart(self, adapters, x)
        else:
            group: groups.Group | None = adapters.group if path == "fused" else None
            y = groups.compute([self], x)[0] if group is None else group.collect(self, x)
        return _shifted(y, self, adapters) if adapters.scaled else y


def _shifted(y: Tensor, host: nn.Module, adapters: Any) -> Tensor:
    """What updates with an output scale add to the bias. Taken away negated: y - 0 is y also where y is -0.0."""
    for term in adapters.terms:
        if (shift := term.shift(host._parameters["bias"])) is not None:
            y = y - (0.0 - shift).to(y.device, y.dtype)
    return y


def _plain(host: nn.Module, adapters: Any, x: Tensor) -> Tensor:
    bias: Tensor | None = host._parameters["bias"]
    training = host.training
    updates = []
    for term in adapters.terms:
        dropout = term.dropout if training else 0.0
        updates += [(*pair, dropout) for pair in term.pairs()]
        if term._parameters["bias"] is not None:
            bias = summed_bias(host._parameters["bias"], adapters.terms)
    y = lora_linear(x, adapters.frozen.dense(), bias, updates)
    return stretched(y, adapters.terms[0].output_scale(adapters.frozen), bias) if adapters.scaled else y


def _apart(host: nn.Module, adapters: Any, x: Tensor) -> Tensor:
    """The base's product, and the updates on top of it."""
    frozen, bias = adapters.frozen, host._parameters["bias"]
    y = frozen_product(host, frozen, x) if adapters.quantized else linear(x, frozen.dense(), bias)
    y, pairs = apart(y, adapters.terms, frozen, bias)
    for term in adapters.terms:
        if term.bias is not None:
            y = y + (term.bias - bias).to(y.dtype)
    updates = [(A, B, s, term.dropout if host.training else 0.0) for term, (A, B, s) in pairs]
    return add_updates_(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), updates).view(y.shape)


@register
class LinearAdapters(MatrixKind):
    """The adapters of a module that computes W0 x + bias."""

    layer = LoraLinear
    role = "linear"
    keys: ClassVar[dict[str, str]] = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "base_layer.bias"}
    all_linear = True
    rests = FrozenLinear

    @classmethod
    def arrange(cls, hosts: Iterable[tuple[str, nn.Module, Kind]]) -> None:
        groups.form(hosts)

    def runs(self, host: nn.Module, plain: torch.dtype | None) -> str:
        dtype = plain if self.quantized and plain is not None else self.frozen.dtype  # those may compute in x's
        x = torch.empty(0, dtype=dtype, device=self.frozen.device)
        return groups.words(host, self, x)
