"""Copies of a base's modules, for an adapter that trains them whole."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..bases import is_quantized
from .frozen import FrozenLinear
from .host import adapters_of, base_modules, submodule, take_layer


def base_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The module's parameters without its adapters'; a tied one under each of its names."""
    for prefix, inner in base_modules(module):
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{name}" if prefix else name, parameter


def deep_copy(host: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a module as its base made it, without the adapters that it may carry."""
    if (adapters := adapters_of(host)) is not None:
        memo[id(adapters)] = adapters
    twin = _bare(copy.deepcopy(host, memo))
    for _, module in base_modules(twin):
        take_layer(module, None)  # of which another copy may act
    return twin


def copy_with_own(host: nn.Module, own: tuple[str, ...], memo: dict[int, Any]) -> nn.Module:
    """The same module, children and all, but with some parameters of its own."""
    twin = host.__new__(type(host))
    twin.__dict__.update(host.__dict__)
    twin._modules = dict(host._modules)
    twin._parameters = dict(host._parameters)
    for name in own:
        start: Any = host._parameters[name]
        twin._parameters[name] = memo.setdefault(id(start), nn.Parameter(start.detach().clone()))
    _bare(twin)
    if is_quantized(twin):
        take_layer(twin, FrozenLinear)
    return twin


def _bare(twin: nn.Module) -> nn.Module:
    """Take the adapters, hooks and replaced forward off a host's copy: the host itself has them."""
    if adapters_of(twin) is not None:
        take_layer(twin, None)
        del twin._modules["lora"]
    for name, value in list(twin.__dict__.items()):
        if name in ("forward", "_old_forward", "_hf_hook"):
            del twin.__dict__[name]
        elif name.startswith(("_forward_", "_backward_")) and isinstance(value, dict):
            twin.__dict__[name] = type(value)()
    return twin


def materialize_(module: nn.Module, trained: Iterable[str]) -> None:
    """Room in memory for trained parameters that are on the meta device, before a file fills them."""
    for name in trained:
        owner, _, leaf = name.rpartition(".")
        inner = submodule(module, owner)
        parameter = inner.get_parameter(leaf)
        if parameter.is_meta:
            inner._parameters[leaf] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
