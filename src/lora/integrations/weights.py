"""The weights that a merge would make, one at a time, for engines that take a plain model's: vLLM's weight sync."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import Quantized, weight_of
from ..layers import base_modules
from ..layers.frozen import model_dtype
from ..layers.host import unwrapped
from ..merging import check_mergeable
from ..resident import is_merged, refuse_sharded


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the plain model that `lora.merge(model, unload=True)` would leave, under the base's names.

    Each tensor is computed as it is asked for, to the bit of the merge; the model is not touched. What no adapter
    changes comes as it is, a quantized weight in 16 bits. Tied parameters come once, as from `named_parameters()`.

    Args:
        model: as it acts: with one adapter, several, none, or merged.

    Raises:
        LoraError: what acts cannot be merged (sharded, tied, not finite); before the first tensor.
    """
    refuse_sharded(model)
    root = unwrapped(model)
    acting = [] if is_merged(root) else check_mergeable(root)
    return _weights(root, {host: (name, adapters) for name, host, adapters in acting}, model_dtype(root))


def _weights(root: nn.Module, acting: dict[nn.Module, Any], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    whole: dict[str, Tensor] = {}  # of modules that an adapter's copy stands for, by full name
    for prefix, module in base_modules(root):
        start = f"{prefix}." if prefix else ""
        own: dict[str, Tensor] = {}
        if module in acting:
            name, adapters = acting[module]
            own = adapters.merged(name, module, dtype)
            whole |= {f"{start}{key}": own.pop(key) for key in list(own) if "." in key}
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{start}{key}"
            value = own.pop(key) if key in own else whole.pop(full) if full in whole else _plain(module, key, dtype)
            yield full, value


def _plain(module: nn.Module, key: str, dtype: torch.dtype | None) -> Tensor:
    weight = weight_of(module) if key == "weight" else None
    if isinstance(weight, Quantized):
        return weight.as_stored(weight.dense(dtype))
    parameter: Tensor = module._parameters[key]  # type: ignore[assignment]
    return parameter.detach()


class Merged:
    """A model seen by code that pushes `model.named_parameters()` somewhere: those of the merged one. All else is the
    model's."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return merged_weights(self._model)
