"""bitsandbytes' weights as frozen weights: 4 bits in blocks, and 8 bits in rows.

bitsandbytes is imported only to quantize again: its modules are known by the name of their class (`weights.weight_of`),
and what they hold is read as tensors.
"""

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraError
from ..ops.dequantize import dequantize, element, format_text

Stored = tuple[list[Tensor], str]
"""The tensors that store a weight, and how: `str(ops.dequantize.Format)`, or "" for a plain matrix."""


class Quantized(ABC):
    """What bitsandbytes' linears have in common: frozen for good, dequantized when used."""

    quantization: str

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def parameter(self) -> Tensor:
        weight: Tensor = self.module._parameters["weight"]
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @abstractmethod
    def stored(self) -> Stored: ...

    @abstractmethod
    def attributes(self) -> dict[str, Any]:
        """The module's attributes that belong to the parameter."""

    @abstractmethod
    def quantized(self, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """A parameter like the present one, and its attributes, of other values (out, in) fp32."""

    def install(self, parameter: Any, attributes: dict[str, Any]) -> None:
        """Give the module a parameter, quantized or plain, and its attributes, on the device where it is now."""
        device = self.parameter.device
        self.module._parameters["weight"] = parameter if parameter.device == device else parameter.to(device)
        for name, value in attributes.items():
            setattr(self.module, name, value)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return dequantize(*self.stored(), dtype or self.dtype)

    def at(self, row: int, column: int) -> Tensor:
        return element(*self.stored(), row, column, torch.float32)


class FourBit(Quantized):
    """bitsandbytes' Linear4bit: NF4 or FP4 (Dettmers et al., 2023, arXiv:2305.14314), absmax nested or not."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        state = getattr(self.parameter, "quant_state", None) or self.module.quant_state
        self.quantization = state.quant_type if state is not None else self.parameter.quant_type  # type: ignore[attr-defined]

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._state().dtype
        return dtype

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return _autocast_dtype(x) or self.module.compute_dtype or x.dtype

    def output_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def _state(self) -> Any:
        # The parameter loses it when FSDP makes a new one of its data; the module has it still.
        state: Any = getattr(self.parameter, "quant_state", None) or self.module.quant_state
        if state is None or _plain(self.parameter).is_meta:
            raise LoraError(
                f"model: the weight of a {type(self.module).__name__} is not quantized yet: bitsandbytes does that "
                "when the module moves to its device; call model.to(device) first, or load it with from_pretrained"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise LoraError(
                "model: bitsandbytes has repacked a 4-bit weight for inference on this CPU, which rounds its scales; "
                "load the model again, and inject or load the adapter before its first forward pass in eval mode"
            )
        return state

    def stored(self) -> Stored:
        state = self._state()
        tensors = [_plain(self.parameter), state.absmax, state.code]
        nested = 0
        if state.state2 is not None:
            nested = state.state2.blocksize
            tensors += [state.state2.absmax, state.state2.code, state.offset]
        return tensors, format_text(state.quant_type, self.shape, state.blocksize, nested)

    def attributes(self) -> dict[str, Any]:
        return {"quant_state": self.module.quant_state}

    def quantized(self, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn.modules import Params4bit

        old: Any = self.parameter
        packed, state = quantize_4bit(
            values, blocksize=self._state().blocksize, compress_statistics=self._state().state2 is not None,
            quant_type=self.quantization, quant_storage=old.dtype,
        )  # fmt: skip
        state.dtype = self.dtype
        parameter = Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=state.blocksize, bnb_quantized=True,
            compress_statistics=state.state2 is not None, quant_type=self.quantization, quant_storage=old.dtype,
        )  # fmt: skip
        return parameter, {"quant_state": state}

    def install(self, parameter: Any, attributes: dict[str, Any]) -> None:
        super().install(parameter, attributes)
        if attributes:
            self.module.quant_state = self.parameter.quant_state  # type: ignore[attr-defined]  # moved along with it


class EightBit(Quantized):
    """bitsandbytes' Linear8bitLt: int8 rows with a scale each (Dettmers et al., 2022, arXiv:2208.07339)."""

    quantization = "int8"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.seen: torch.dtype | None = None  # by the last call: a net of int8 linears alone tells no other

    @property
    def dtype(self) -> torch.dtype:
        return self.seen or torch.float16  # which bitsandbytes rounds every weight to before it quantizes it

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        self.seen = _autocast_dtype(x) or x.dtype
        return self.seen

    def output_dtype(self, x: Tensor) -> torch.dtype:
        return self.compute_dtype(x)

    def stored(self) -> Stored:
        weight: Any = self.parameter
        if self.module.state.has_fp16_weights:
            raise LoraError(
                f"model: a {type(self.module).__name__} keeps a {weight.dtype} weight and quantizes it in each pass "
                "(has_fp16_weights=True), which is not supported; make it with has_fp16_weights=False, or use an "
                "nn.Linear"
            )
        # The scales lie on the parameter until the first forward pass of bitsandbytes, and then on the module.
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else self.module.state.SCB
        if weight.dtype == torch.int8 and scales is None:
            raise LoraError(
                f"model: the weight of a {type(self.module).__name__} has lost its scales (SCB): something put another "
                "parameter in its place; run the model once before that, so that bitsandbytes moves them to the module"
            )
        if weight.is_meta or weight.dtype != torch.int8:
            raise LoraError(
                f"model: the weight of a {type(self.module).__name__} is {weight.dtype} and not quantized yet: "
                "bitsandbytes does that when the module moves to its device; call model.to(device) first, or load it "
                "with from_pretrained"
            )
        return [weight.detach(), scales], format_text("int8", self.shape)

    def attributes(self) -> dict[str, Any]:
        return {"state": self.module.state}

    def quantized(self, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, scales, _ = int8_vectorwise_quant(values.half())
        kind: Any = type(self.parameter)
        parameter = kind(codes, requires_grad=False, CB=codes, SCB=scales)
        state = copy.copy(self.module.state)
        state.CB = state.SCB = None
        return parameter, {"state": state}

    def install(self, parameter: Any, attributes: dict[str, Any]) -> None:
        super().install(parameter, attributes)
        state = self.module.state
        if attributes and state.CB is not None:  # bitsandbytes has moved them here from the parameter
            state.CB, state.SCB = self.parameter.data, state.SCB.to(self.parameter.device)


def _plain(parameter: Tensor) -> Tensor:
    """The parameter as a plain tensor, with its version, unlike .data. Its class takes each call through Python."""
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.detach()


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x, where it is on; bitsandbytes' own products go through it too."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
