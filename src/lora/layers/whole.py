"""A module that an adapter trains whole: it works on its own copy while the adapter acts."""

from typing import Any

from torch import nn

from ..bases import is_quantized
from .frozen import FrozenLinear
from .host import Adapters, LoraLayer


class Whole(nn.Module):
    """One adapter's copy of a module. `trained`: the names of its parameters that train; others are the base's own."""

    def __init__(self, module: nn.Module, trained: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.trained = trained


class WholeLayer(LoraLayer):
    """A module while an adapter's copy of it acts in its place."""

    @property
    def weight(self) -> Any:
        """The copy's, for code that reads the weight and does not call the module (a fused loss, tied embeddings)."""
        return self.lora.terms[-1].module.weight

    @property
    def bias(self) -> Any:
        return self.lora.terms[-1].module.bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.lora.terms[-1].module(*args, **kwargs)


class WholeAdapters(Adapters):
    """The copies of one module, by adapter."""

    layer = WholeLayer
    terms: tuple[Whole, ...]

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        if is_quantized(host):  # an adapter trains its bias
            self.resting_layer = FrozenLinear
