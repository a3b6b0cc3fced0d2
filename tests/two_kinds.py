"""A linear and a Conv1D of one shape, and what the tests of merging do to them."""

import warnings

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora
from conftest import randomize, snapshot
from lora.layers import adapters_of, hosts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class TwoKinds(nn.Module):
    """A linear and a Conv1D of one shape, with weights as training leaves them: heavy tails and loud columns."""

    def __init__(self, rows: int = 192, columns: int = 160, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, rows)
        self.conv = Conv1D(rows, columns)
        generator = torch.Generator().manual_seed(7)
        for weight in (self.linear.weight.data, self.conv.weight.data):
            body = torch.randn(weight.shape, generator=generator)
            tail = torch.randn(weight.shape, generator=generator).abs() + 0.2
            weight.copy_(0.02 * body / tail.sqrt())
            weight[:, ::37] *= 8
            weight[3, :3] = torch.tensor([0.0, -0.0, 1e-7])
        self.conv.bias.data.normal_(generator=generator)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.conv(x)


def matrix(host: nn.Module) -> Tensor:
    return host.weight.t() if isinstance(host, Conv1D) else host.weight


def update64(host: nn.Module, names: list[str] | None = None) -> Tensor:
    """D in float64, from the adapters' own tensors."""
    found = adapters_of(host)
    return sum(
        found[n].scaling * (found[n].B.detach().double() @ found[n].A.detach().double()) for n in names or found.active
    )


def scale_updates(model: nn.Module, ratio: float, seed: int = 1) -> None:
    """Random A and B, so that each D has `ratio` of its W0's norm."""
    generator = torch.Generator().manual_seed(seed)
    for _, host, adapters in hosts(model):
        part = adapters[adapters.active[0]]
        part.A.data.normal_(generator=generator)
        part.B.data.normal_(generator=generator)
        part.B.data *= ratio * host.weight.double().norm() / update64(host).norm()


def merge(model: nn.Module, **keywords: object) -> "lora.merging.MergeReport":
    """merge without its warning about rounding, which most of these tests cause on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora.LoraWarning)
        return lora.merge(model, **keywords)


def merged_model(dtype: torch.dtype = torch.bfloat16) -> tuple[TwoKinds, dict[str, Tensor]]:
    """(merged model, its state dict before the merge)"""
    model = TwoKinds(dtype=dtype)
    lora.inject(model, targets=["linear", "conv"], bias="lora_only")
    scale_updates(model, 0.2)
    randomize(model, std=1e-3)
    before = snapshot(model)
    merge(model)
    return model, before
