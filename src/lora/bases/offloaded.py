"""Weights that accelerate keeps elsewhere and brings for each call: device_map, cpu_offload, disk_offload."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def offload_of(module: nn.Module) -> Any:
    """accelerate's hook that keeps a module's tensors elsewhere between its calls; None where there is none."""
    hook = module.__dict__.get("_hf_hook")
    return next((each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)), None)


def running_device(module: nn.Module, parameter: Tensor) -> torch.device:
    """Where a module computes with one of its parameters, which may be on the meta device between its calls."""
    device = getattr(offload_of(module), "execution_device", None) if parameter.is_meta else None
    return parameter.device if device is None else torch.device(device)


@contextmanager
def brought(module: nn.Module) -> Iterator[None]:
    """Have a module's own tensors where it computes, as during its call; the same objects stand in it afterwards."""
    hook = offload_of(module)
    if hook is None:
        yield
        return
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    try:
        hook.pre_forward(module)
        yield
    finally:
        hook.post_forward(module, None)
        module._parameters.update(parameters)
        module._buffers.update(buffers)
