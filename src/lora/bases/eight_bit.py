"""LLM.int8() (Dettmers et al., 2022, arXiv:2208.07339): int8 rows with a scale each, in bitsandbytes' Linear8bitLt.

    W = round(CB * (SCB * (1 / 127)))       SCB of the row

Each product is rounded to fp32 by itself, and the result once more to the dtype asked for, as bitsandbytes has it.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraError
from ..ops.dequantize import Launch, Layout, has_triton, layout_text, register_layout
from .bitsandbytes import BitsAndBytes, autocast_dtype
from .weight import Stored

INVERSE = 1 / 127


@dataclass(frozen=True)
class EightBitLayout(Layout):
    """CB (out, in) int8, SCB (out,) fp32."""

    @functools.cached_property
    def parts(self) -> list[tuple[int, torch.dtype | None]]:
        rows, columns = self.shape
        return [(rows * columns, torch.int8), (rows, torch.float32)]

    def dense(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return (parts[0] * (parts[1] * INVERSE)[:, None]).to(dtype)

    def element(self, parts: Sequence[Tensor], row: int, column: int) -> Tensor:
        return parts[0][row, column].float() * (parts[1][row] * INVERSE)

    def launch(self, parts: Sequence[Tensor]) -> Launch | None:
        if not has_triton():
            return None
        from ..kernels.dequantize import int8

        return int8(parts[0].contiguous(), parts[1].contiguous())


class EightBit(BitsAndBytes):
    """bitsandbytes' Linear8bitLt."""

    classes = ("Linear8bitLt",)
    into = loads = ("int8",)
    note = (
        "int8: training multiplies by the dequantized weights and never quantizes activations; in eval mode without "
        "gradients bitsandbytes' LLM.int8() runs"
    )

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.quantization = None if self.module.state.has_fp16_weights else "int8"
        self.seen: torch.dtype | None = None  # by the last call: a net of int8 linears alone tells no other

    @property
    def dtype(self) -> torch.dtype:
        return self.seen or torch.float16  # which bitsandbytes rounds every weight to before it quantizes it

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        self.seen = autocast_dtype(x) or x.dtype
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
            raise self.unquantized(f"{weight.dtype} and ")
        return [weight.detach(), scales], layout_text("int8", self.shape)

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

    @classmethod
    def load_settings(cls, name: str, dtype: torch.dtype | str, skip: Sequence[str] = ()) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip) or None)  # type: ignore[no-untyped-call]

    @classmethod
    def sample(cls, name: str, inputs: int, outputs: int) -> nn.Module:
        from bitsandbytes.nn import modules

        made: Any = modules.Linear8bitLt
        return made(inputs, outputs, bias=False, has_fp16_weights=False)  # type: ignore[no-any-return]

    @classmethod
    def planned(cls, name: str, shape: tuple[int, int], settings: dict[str, Any] | None = None) -> str:
        return layout_text(name, shape)

    @classmethod
    def saved_as(cls, settings: dict[str, Any]) -> str | None:
        return "int8" if settings.get("load_in_8bit") else None


register_layout("int8", EightBitLayout)
