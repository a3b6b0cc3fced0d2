"""What a model carries, asked and changed over all its hosts at once; the hosts hold the state, not the model."""

from collections.abc import Iterable

import torch
from torch import nn

from .errors import LoraError
from .layers.base import Adapter, activate, detach, hosts


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and data-parallel wrappers, whose names are those of the checkpoint."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model, torch.jit.ScriptModule):
            raise LoraError("model: a TorchScript module has fixed layers; adapt it before torch.jit.script")
        else:
            return model


def resident(root: nn.Module) -> dict[str, Adapter]:
    """The adapters that a model carries, by name, in the order in which they came to its first host."""
    found: dict[str, Adapter] = {}
    for _, _, adapters in hosts(root):
        found.update(adapters.records)
    return found


def acting(root: nn.Module) -> list[str]:
    """The names of the adapters that act (or would, were they not merged)."""
    return list(dict.fromkeys(name for _, _, adapters in hosts(root) for name in adapters.active))


def is_merged(root: nn.Module) -> bool:
    return any(adapters.undo is not None for _, _, adapters in hosts(root))


def activate_all(root: nn.Module, names: Iterable[str]) -> None:
    names = list(names)
    for _, host, _ in hosts(root):
        activate(host, names)


def drop(root: nn.Module, names: Iterable[str]) -> None:
    """Detach adapters from an unmerged model; with the last one the base may train again as before."""
    names = list(names)
    record = next(iter(resident(root).values()))
    for _, host, adapters in list(hosts(root)):
        for name in names:
            if name in adapters:
                detach(host, name)
    if not resident(root):
        for parameter_name, parameter in root.named_parameters():
            parameter.requires_grad_(parameter_name in record.trainable_before)
