"""What a whole model, and who trains, saves or loads it, is told about the formats of its weights."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .weight import FrozenWeight, Quantized, kinds


def allow_training(root: nn.Module, allowed: bool) -> None:
    """Let others, such as transformers' Trainer, train a quantized model that carries adapters, or no longer."""
    for kind in kinds():
        kind.allow_training(root, allowed)


def forget_quantization(root: nn.Module, names: Iterable[str]) -> None:
    """Make a model's config say which modules are no longer quantized, so that it is saved as it is."""
    names = list(names)
    for kind in kinds():
        kind.forget(root, names)


def into_names() -> list[str]:
    """The quantizations that a merge may be told to quantize its sum in again."""
    return [name for kind in kinds() if issubclass(kind, Quantized) for name in kind.into]


def loadable() -> dict[str, type[FrozenWeight]]:
    """The quantizations that a model can be loaded in, and their formats."""
    return {name: kind for kind in kinds() for name in kind.loads}


def saved_as(settings: dict[str, Any]) -> tuple[str, type[FrozenWeight] | None]:
    """The quantization that a saved model's `quantization_config` tells of, and its format, if one knows it."""
    for kind in reversed(kinds()):
        name = kind.saved_as(settings)
        if name is not None:
            return name, kind
    return str(settings.get("quant_method", "an unknown quantization")), None
