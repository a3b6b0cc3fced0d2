"""DoRA as it is defined, in float64, for adapters of this library: what they compute and what they make of a weight."""

from typing import Any

import torch
from torch import Tensor, nn

from lora.layers import adapters_of, hosts


def fill(model: nn.Module, std: float = 0.2, stretch: float = 0.3, seed: int = 1) -> nn.Module:
    """Give every adapter of a model A and B as training would, and magnitudes away from the norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, _, adapters in hosts(model):
            for name in adapters.active:
                for key, p in adapters[name].named_parameters():
                    if not p.requires_grad:  # the base's own, in a copy that an adapter trains in part
                        continue
                    draw = torch.randn(p.shape, generator=generator).to(p.device)
                    p.copy_(p * (1 + stretch * draw) if key == "magnitude" else p + std * draw)
    return model


def matrix64(host: Any) -> Tensor:
    """W0 (out, in)."""
    return adapters_of(host).frozen.dense().detach().double()


def leaves64(part: nn.Module) -> dict[str, Tensor]:
    """An update's parameters in float64, to differentiate by."""
    return {name: p.detach().double().requires_grad_() for name, p in part.named_parameters()}


def changed(W: Tensor, A: Tensor, B: Tensor, s: float, magnitude: Tensor | None = None) -> Tensor:
    """W0 under one update: m V / |V| by row, the norm a constant; without m W0 + s B A."""
    V = W + s * B @ A
    if magnitude is None:
        return V
    return magnitude[:, None] * V / V.detach().norm(dim=1, keepdim=True)


def together64(host: Any, names: list[str] | None = None, leaves: dict[str, dict[str, Tensor]] | None = None) -> Tensor:
    """W0 and what each of the adapters makes of it alone, the changes added."""
    found, W = adapters_of(host), matrix64(host)
    total = W
    for name in names or found.active:
        own = (leaves or {}).get(name) or leaves64(found[name])
        total = total + changed(W, own["A"], own["B"], found[name].scaling, own.get("magnitude")) - W
    return total


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()
