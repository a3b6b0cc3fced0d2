"""A small net with what verbs trip over: a shared linear, a Conv1D, no bias, a norm."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conftest import randomize

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A linear used under two names, a Conv1D, a linear without bias, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6, bias=False), Conv1D(6, 6)])
        self.layers.append(self.layers[0])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)
        nn.init.normal_(self.layers[2].bias)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def original(model: nn.Module) -> tuple:
    return (
        [(n, type(m), m.training) for n, m in model.named_modules(remove_duplicate=False)],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
        list(model.state_dict()),
        [sorted(m.__dict__) for m in model.modules()],
    )


def acts(model: nn.Module, x: Tensor) -> bool:
    """Whether every adapter parameter of the model has a gradient: an adapter that is passed by has none."""
    randomize(model)
    model(x).float().sum().backward()
    grads = {n: p.grad is not None for n, p in model.named_parameters() if p.requires_grad}
    assert grads
    return all(grads.values())
