"""A small net, and what others do to the classes of its modules."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora
from conftest import randomize

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Halved(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2


class Marked(nn.Linear):
    """A class of the user's without a forward of its own, and with a parameter of its own."""

    mark = "here"

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.extra = nn.Parameter(torch.ones(2))

    def extra_repr(self) -> str:
        return super().extra_repr() + ", marked"


class Doubled(nn.Linear):
    """A class of the user's around whatever forward it finds."""

    mark = "here"

    @property
    def size(self) -> int:
        return self.weight.numel()

    def forward(self, x: Tensor, *, times: float = 2.0) -> Tensor:
        return super().forward(x) * times


def to_class(cls: type[nn.Module]) -> Callable[[nn.Module], None]:
    def take(module: nn.Module) -> None:
        module.__class__ = cls

    return take


def over_its_own(module: nn.Module) -> None:
    """Of whichever class the module has now."""

    class Over(type(module)):  # type: ignore[misc]
        mark = "here"

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    module.__class__ = Over


def halve_extra(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "extra", Halved())
    assert torch.equal(module.extra, torch.full((2,), 0.5))


def build(cls: type[nn.Module] = nn.Linear) -> Any:
    torch.manual_seed(0)
    parts = {"first": cls(6, 6), "norm": nn.LayerNorm(6), "last": nn.Linear(6, 3)}
    return nn.Sequential(OrderedDict(parts))


def adapt(model: Any, settings: dict[str, Any]) -> Any:
    """Two adapters; "a" acts."""
    torch.manual_seed(1)
    lora.inject(model, r=2, name="b", **settings)
    return randomize(lora.inject(model, r=2, name="a", **settings))
