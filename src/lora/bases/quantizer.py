"""What transformers keeps on a model that bitsandbytes quantized, kept true while the model is adapted or merged."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..layers.frozen import is_quantized
from ..layers.host import base_modules

_CLASSES: dict[type, type] = {}


def allow_training(root: nn.Module, allowed: bool) -> None:
    """Let transformers' Trainer take a quantized model, which it refuses unless it sees an adapter that it knows.

    It asks the model's quantizer; that one object takes a subclass that says yes, and its own class again at the end.
    """
    quantizer: Any = getattr(root, "hf_quantizer", None)
    if quantizer is None or getattr(quantizer.quantization_config, "quant_method", None) != "bitsandbytes":
        return
    kind = type(quantizer)
    if allowed and kind not in _CLASSES.values():
        quantizer.__class__ = _trainable(kind)
    elif not allowed and kind in _CLASSES.values():
        quantizer.__class__ = kind.__mro__[1]


def _trainable(kind: type) -> type:
    if kind not in _CLASSES:
        body = {"is_qat_trainable": True, "__reduce_ex__": _reduce, "__module__": kind.__module__}
        _CLASSES[kind] = type(kind.__name__, (kind,), body)
    return _CLASSES[kind]


def _reduce(quantizer: Any, protocol: Any) -> Any:
    # The class is made at run time, so pickle and deepcopy name the one that it is made of.
    return _revive, (type(quantizer).__mro__[1], quantizer.__dict__)


def _revive(kind: Any, attributes: dict[str, Any]) -> Any:
    quantizer = kind.__new__(kind)
    quantizer.__dict__.update(attributes)
    quantizer.__class__ = _trainable(kind)
    return quantizer


def forget_quantization(root: nn.Module, names: Iterable[str]) -> None:
    """Make a transformers model's config say which modules are no longer quantized, so that it is saved as it is."""
    quantizer: Any = getattr(root, "hf_quantizer", None)
    if quantizer is None:
        return
    forget_reading(root)
    if not any(is_quantized(module) for _, module in base_modules(root)):
        quantizer.remove_quantization_config(root)
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            root.__dict__.pop(flag, None)
        return
    settings: Any = quantizer.quantization_config
    # Once a list is given, it is the whole truth: what was left out by default must be in it.
    left_out = settings.llm_int8_skip_modules or getattr(quantizer, "modules_to_not_convert", None) or []
    settings.llm_int8_skip_modules = sorted({*left_out, *names})


def forget_reading(root: Any) -> None:
    """Let a model that was read quantized be saved: transformers 5 wants to undo each step of its reading, and cannot
    undo bitsandbytes', of which nothing needs to be undone."""
    root._weight_conversions = [
        conversion
        for conversion in getattr(root, "_weight_conversions", None) or []
        if not any(type(step).__module__.endswith(".bitsandbytes") for step in getattr(conversion, "operations", []))
    ]


def model_dtype(root: nn.Module) -> torch.dtype | None:
    """The dtype of a model's activations, as far as its parameters tell: 16 bits where any that is not quantized has 16
    bits, since norms, heads and biases may be held in more, and no float32 model holds any in less."""
    dtypes = []
    for _, module in base_modules(root):
        names = ["bias"] if is_quantized(module) else list(module._parameters)
        found = [module._parameters.get(name) for name in names]
        dtypes += [p.dtype for p in found if p is not None and p.is_floating_point()]
    return next((dtype for dtype in dtypes if dtype.itemsize == 2), dtypes[0] if dtypes else None)
