"""What a model carries, asked and changed over all its hosts at once; the hosts hold the state, not the model."""

from typing import Any

import torch
from torch import nn

from .bases import allow_training
from .config import check_name
from .errors import LoraError, near
from .layers import Adapter, hosts
from .layers.copies import base_parameters
from .layers.frozen import settle
from .layers.host import activate, detach, outside_adapters, unwrapped


def unwrap(model: nn.Module, changing: bool = False) -> nn.Module:
    """The module inside torch.compile's and data-parallel wrappers, whose names are those of the checkpoint.

    `changing`: parameters are about to be added, which a data-parallel wrapper, also one inside, would not notice.
    """
    root = unwrapped(model)
    if isinstance(root, torch.jit.ScriptModule):
        raise LoraError("model: a TorchScript module has fixed layers; adapt it before torch.jit.script")
    for module in outside_adapters(model) if changing else ():
        if _is_fsdp1(module) or isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise LoraError(f"model: {type(module).__name__} would not sync new parameters; add them, then wrap it")
    return root


def refuse_sharded(model: nn.Module, writing: bool = False) -> None:
    """Refuse to read parameters where FSDP1 has a slice of them, and to write to what it may not notice."""
    for module in model.modules():
        handle: Any = getattr(module, "_handle", None) if _is_fsdp1(module) else None
        if handle is not None and (writing or handle.is_sharded(handle.flat_param)):
            instead = (
                "load the base and the adapter in one process and merge there"
                if writing
                else ("call this within FullyShardedDataParallel.summon_full_params(model), in every process")
            )
            raise LoraError(f"model: its parameters are sharded over several processes (FSDP1); {instead}")


def _is_fsdp1(module: nn.Module) -> bool:
    return "_fsdp_wrapped_module" in module._modules


def check_root(root: nn.Module) -> None:
    """Refuse to add or remove through another module than the one that was adapted: names would not be the same."""
    carried = {host: adapters for host, _, adapters in hosts(root)}
    for name, record in resident(root).items():
        if name not in carried.get(record.anchor, ()):
            raise LoraError(
                f"model: adapter {name!r} was given to a module that this one is a part of, or that is a part of this "
                "one; add and remove adapters through the same module"
            )


def resident(root: nn.Module) -> dict[str, Adapter]:
    """The adapters that a model carries, by name, in the order in which they came to its first host."""
    found: dict[str, Adapter] = {}
    for _, _, adapters in hosts(root):
        found.update(adapters.records)
    return found


def named(root: nn.Module, name: str | None, otherwise: str) -> list[str]:
    """The adapter of that name, or all of them. Raises LoraError where there is none; `otherwise`: of any name."""
    there = resident(root)
    names = list(there) if name is None else [check_name(name)]
    if not there:
        raise LoraError(f"model: it has no adapter {otherwise}")
    if names[0] not in there:
        raise LoraError(f"name: the model has no adapter {name!r}{near(names[0], there)}")
    return names


def acting(root: nn.Module) -> list[str]:
    """The names of the adapters that act (or would, were they not merged)."""
    return list(dict.fromkeys(name for _, _, adapters in hosts(root) for name in adapters.active))


def is_merged(root: nn.Module) -> bool:
    return any(adapters.undo is not None for _, _, adapters in hosts(root))


def refuse_merged(root: nn.Module) -> None:
    if is_merged(root):
        raise LoraError("model: its adapters are merged already; call lora.unmerge(model) first")


def activate_all(root: nn.Module, names: list[str]) -> None:
    for _, host, _ in hosts(root):
        activate(host, names)


def drop(root: nn.Module, names: list[str]) -> None:
    """Detach adapters that are not merged; with the last one the base may train again as before."""
    record = next(iter(resident(root).values()))
    for _, host, adapters in list(hosts(root)):
        for name in names:
            if name in adapters:
                detach(host, name)
    settle(root, carries=bool(resident(root)))
    if not resident(root):
        allow_training(root, False)
        for parameter_name, parameter in base_parameters(root):
            parameter.requires_grad_(parameter_name in record.trainable_before)
