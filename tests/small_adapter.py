"""A small adapter whose values and scaling tell which save it is from."""

from pathlib import Path

import torch
from torch import nn

import lora

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))


def made(value: float, alpha: float) -> nn.Module:
    model = lora.inject(net(), r=2, alpha=alpha, targets=["0", "1"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)
    return model


def found(folder: Path) -> tuple[float, float]:
    """(the value, alpha) of what a load gives"""
    part = lora.load(net(), folder)[0].lora["default"]
    return part.A.unique().item(), part.scaling * 2


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
