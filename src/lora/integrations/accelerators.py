"""accelerate's `save_state` and `load_state` with the adapters in place of the model, by the hooks that it has."""

import os
from pathlib import Path
from typing import Any
from weakref import WeakSet

from ..errors import LoraError
from .carried import carries, load_adapters, save_adapters

_HOOKED: WeakSet[Any] = WeakSet()


def is_accelerator(found: Any) -> bool:
    return any(c.__name__ == "Accelerator" and c.__module__.startswith("accelerate.") for c in type(found).__mro__)


def adapters_in_states(accelerator: Any) -> None:
    """Register the hooks, once. Models without adapters are written and read as ever."""
    if accelerator not in _HOOKED:
        _HOOKED.add(accelerator)
        accelerator.register_save_state_pre_hook(_Save(accelerator))
        accelerator.register_load_state_pre_hook(_Load(accelerator))


class _Hook:
    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def adapted(self, models: list[Any], folder: str | os.PathLike[str]) -> dict[int, tuple[Any, Path]]:
        """By place in the list: the models that carry adapters, and each one's folder."""
        inside = {i: self.accelerator.unwrap_model(model) for i, model in enumerate(models)}
        return {i: (model, Path(folder) / f"adapter_{i}") for i, model in inside.items() if carries(model)}


class _Save(_Hook):
    def __call__(self, models: list[Any], weights: list[Any], folder: str) -> None:
        found = self.adapted(models, folder)
        if found and len(weights) != len(models):
            raise LoraError(
                f"accelerator: under {self.accelerator.distributed_type} it writes whole models by itself; train with "
                "DDP or on one device"
            )
        for place in sorted(found, reverse=True):
            model, path = found[place]
            if self.accelerator.is_main_process:
                save_adapters(model, path)
            del weights[place]


class _Load(_Hook):
    def __call__(self, models: list[Any], folder: str) -> None:
        found = self.adapted(models, folder)
        for place in sorted(found, reverse=True):
            load_adapters(*found[place])
            del models[place]
