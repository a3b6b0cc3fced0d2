"""What the formats of bitsandbytes share: their modules' own forward, and what transformers keeps on their models.

bitsandbytes is imported only to quantize again: its modules are known by the name of their class, and what they hold is
read as tensors.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraError
from .weight import Quantized, is_quantized


class BitsAndBytes(Quantized):
    """A linear of bitsandbytes.

    With gradients bitsandbytes would quantize the activations of an int8 linear and keep copies of them, and dequantize
    a 4-bit one in three launches. So its own forward runs only without: there it is what people deploy, LLM.int8() with
    its outliers, and the fused 4-bit products for few rows.
    """

    package = "bitsandbytes"

    def runs_own_forward(self, host: nn.Module, x: Tensor) -> bool:
        # Not in training mode even without gradients: reentrant checkpointing runs so at first.
        return not (torch.is_grad_enabled() or host.training)

    def own_forward(self, host: nn.Module, original: type[nn.Module], x: Tensor) -> Tensor:
        bias = host._parameters["bias"]
        kept = None if bias is None else bias.data
        y = super().own_forward(host, original, x)
        if bias is not None and kept is not None and bias.dtype != kept.dtype:
            bias.data = kept  # bitsandbytes casts it to x's dtype in place
        return y

    def why_not_plain(self) -> str | None:
        if getattr(self.module, "source_cls", nn.Linear).__name__ != "Conv1D":
            return None
        return (
            "was a Conv1D before it was quantized, whose weight lies the other way round, so a 16-bit linear in its "
            "place would be saved wrong"
        )

    def unquantized(self, what: str = "") -> LoraError:
        """The error of a weight that still waits for its device; `what` it is, and "and"."""
        return LoraError(
            f"model: the weight of a {type(self.module).__name__} is {what}not quantized yet: bitsandbytes does that "
            "when the module moves to its device; call model.to(device) first, or load it with from_pretrained"
        )

    @classmethod
    def require(cls, why: str) -> None:
        require_bitsandbytes(why)

    @classmethod
    def allow_training(cls, root: nn.Module, allowed: bool) -> None:
        """Let transformers' Trainer take the model, which it refuses unless it sees an adapter that it knows.

        It asks the model's quantizer; that one object takes a subclass that says yes, and its own class at the end.
        """
        quantizer = _quantizer(root)
        kind = type(quantizer)
        if quantizer is not None and allowed != (kind in _CLASSES.values()):
            quantizer.__class__ = _trainable(kind) if allowed else kind.__mro__[1]

    @classmethod
    def forget(cls, root: nn.Module, names: Iterable[str]) -> None:
        quantizer = _quantizer(root)
        if quantizer is None:
            return
        cls.after_loading(root)
        if not any(is_quantized(module) for module in root.modules()):
            quantizer.remove_quantization_config(root)
            for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
                root.__dict__.pop(flag, None)
            return
        settings = quantizer.quantization_config
        # Once a list is given, it is the whole truth: what was left out by default must be in it.
        left_out = settings.llm_int8_skip_modules or getattr(quantizer, "modules_to_not_convert", None) or []
        settings.llm_int8_skip_modules = sorted({*left_out, *names})

    @classmethod
    def touches(cls, root: nn.Module) -> list[Any]:
        quantizer = _quantizer(root)
        return [] if quantizer is None else [quantizer, quantizer.quantization_config, root.config]

    @classmethod
    def after_loading(cls, model: Any) -> None:
        """Let the model be saved: transformers 5 wants to undo each step of its reading, and cannot undo bitsandbytes',
        of which nothing needs to be undone."""
        found = getattr(model, "_weight_conversions", None) or []
        steps = [[type(step).__module__ for step in getattr(conversion, "operations", [])] for conversion in found]
        ours = [any(module.endswith(".bitsandbytes") for module in modules) for modules in steps]
        model._weight_conversions = [conversion for conversion, its in zip(found, ours, strict=True) if not its]


def require_bitsandbytes(why: str) -> None:
    """Raises `LoraError` where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise LoraError(f"{why}, which needs bitsandbytes; pip install 'lora-torch[quant]'")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x, where it is on; bitsandbytes' own products go through it too."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


_CLASSES: dict[type, type] = {}


def _quantizer(root: nn.Module) -> Any:
    """The object by which transformers quantized the model with bitsandbytes, or None."""
    quantizer: Any = getattr(root, "hf_quantizer", None)
    method = None if quantizer is None else getattr(quantizer.quantization_config, "quant_method", None)
    return quantizer if method == "bitsandbytes" else None


def _trainable(kind: type) -> type:
    if kind not in _CLASSES:
        body = {"is_qat_trainable": True, "__reduce_ex__": _reduce, "__module__": kind.__module__}
        _CLASSES[kind] = type(kind.__name__, (kind,), body)
    return _CLASSES[kind]


def _reduce(quantizer: Any, protocol: Any) -> Any:
    # The class is made at run time, so pickle and deepcopy name the one that it is made of.
    return _revive, (type(quantizer).__mro__[1],), quantizer.__dict__


def _revive(kind: type) -> Any:
    return object.__new__(_trainable(kind))
