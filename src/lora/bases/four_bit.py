"""NF4 and FP4 (Dettmers et al., "QLoRA", 2023, arXiv:2305.14314): 4 bits in blocks, in bitsandbytes' Linear4bit.

    W = round(code[nibble] * absmax[i // block])                    i counts the weights row by row
    absmax[b] = code2[q[b]] * absmax2[b // nested] + offset         where the absmax is quantized as well

Each product and sum is rounded to fp32 by itself, and the result once more to the dtype asked for: bit for bit what
bitsandbytes makes of it. Two weights share a byte, the first in the high nibble.

Two things of bitsandbytes' CUDA kernels stay theirs: FP4's second zero is negative, though `code` has none such, and
what is below the smallest normal fp32 number becomes zero.
"""

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

FEW = 64
"""Rows up to which bitsandbytes' fused products, which never write the dense weight, are the faster ones."""
USUAL_BLOCK, USUAL_NESTED = 64, 256  # bitsandbytes' defaults


@dataclass(frozen=True)
class FourBitLayout(Layout):
    """packed: ceil(out in / 2) bytes of any dtype and shape; absmax (blocks,) fp32; code (16,) fp32.

    Nested: packed, absmax (blocks,) uint8, code, absmax2 (ceil(blocks / nested),), code2 (256,), offset (); fp32.

    Args:
        block: weights that share an absmax; nested: absmax values that share an absmax2, or 0.
    """

    forms = ("OUTxIN:BLOCK", "OUTxIN:BLOCK:NESTED")
    block: int = USUAL_BLOCK
    nested: int = 0

    @functools.cached_property
    def parts(self) -> list[tuple[int, torch.dtype | None]]:
        count = self.shape[0] * self.shape[1]
        blocks = -(-count // self.block)
        absmax = torch.uint8 if self.nested else torch.float32
        outer = (-(-blocks // self.nested), 256, 1) if self.nested else ()
        return [(-(-count // 2), None), (blocks, absmax), *((n, torch.float32) for n in (16, *outer))]

    def dense(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        packed, absmax, code, *outer = parts
        if self.nested:
            absmax2, code2, offset = outer
            absmax = _blockwise_(code2.index_select(0, absmax.int()), absmax2, self.nested) + offset
        pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)  # (256, 2), by the byte
        values = pairs.index_select(0, _bytes(packed).int()).view(-1)[: self.shape[0] * self.shape[1]]
        return _blockwise_(values, absmax, self.block).view(self.shape).to(dtype)

    def element(self, parts: Sequence[Tensor], row: int, column: int) -> Tensor:
        index = row * self.shape[1] + column
        byte = _bytes(parts[0])[index // 2].long()
        block = index // self.block
        absmax = parts[1][block]
        if self.nested:
            absmax = parts[4][absmax.long()] * parts[3][block // self.nested] + parts[5].reshape(())
        return parts[2][byte & 15 if index % 2 else byte >> 4] * absmax

    def launch(self, parts: Sequence[Tensor]) -> Launch | None:
        if not has_triton() or self.block % 8 or self.block & (self.block - 1):
            return None  # each block that bitsandbytes makes is a power of two
        from ..kernels.dequantize import four_bit

        flat = [_bytes(parts[0]), *[t.contiguous() for t in parts[1:]]]
        return four_bit(self.shape[0] * self.shape[1], flat, self.block, self.nested)


def _bytes(packed: Tensor) -> Tensor:
    """The packed nibbles (bytes,) uint8, whatever dtype holds them."""
    flat = packed.reshape(-1)
    return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)


def _blockwise_(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Multiply values (n,) in place, each block of them by its scale; the last block may be short."""
    blocks = values.numel() // block
    values[: blocks * block].view(-1, block).mul_(scales[:blocks, None])
    values[blocks * block :].mul_(scales[blocks : blocks + 1])
    return values


class FourBit(BitsAndBytes):
    """bitsandbytes' Linear4bit, its absmax nested or not."""

    classes = ("Linear4bit",)
    into = ("nf4", "fp4")
    loads = ("nf4",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        parameter: Any = self.parameter
        state = getattr(parameter, "quant_state", None) or self.module.quant_state
        self.quantization = state.quant_type if state is not None else parameter.quant_type

    @property
    def dtype(self) -> torch.dtype:
        return self._state().dtype  # type: ignore[no-any-return]

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return autocast_dtype(x) or self.module.compute_dtype or x.dtype

    def _state(self) -> Any:
        # The parameter loses it when FSDP makes a new one of its data; the module has it still.
        state: Any = getattr(self.parameter, "quant_state", None) or self.module.quant_state
        if state is None or _plain(self.parameter).is_meta:
            raise self.unquantized()
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
        return tensors, layout_text(state.quant_type, self.shape, state.blocksize, nested)

    @property
    def label(self) -> str:
        state = self._state()
        block = "" if state.blocksize == USUAL_BLOCK else f" in blocks of {state.blocksize}"
        return f"{'' if state.state2 is None else 'double-quantised '}{state.quant_type}{block}"

    def runs_own_forward(self, host: nn.Module, x: Tensor) -> bool:
        # On a CPU it would repack the weight in place and round the scales.
        return x.is_cuda and x.numel() <= FEW * x.shape[-1] and super().runs_own_forward(host, x)

    def attributes(self) -> dict[str, Any]:
        return {"quant_state": self.module.quant_state}

    def quantized(self, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn.modules import Params4bit

        old = self._state()
        options: dict[str, Any] = {
            "blocksize": old.blocksize, "compress_statistics": old.state2 is not None,
            "quant_type": self.quantization, "quant_storage": self.parameter.dtype,
        }  # fmt: skip
        packed, state = quantize_4bit(values, **options)
        state.dtype = old.dtype
        parameter = Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True, **options)
        return parameter, {"quant_state": state}

    def install(self, parameter: Any, attributes: dict[str, Any]) -> None:
        super().install(parameter, attributes)
        if attributes:
            self.module.quant_state = self.parameter.quant_state  # type: ignore[attr-defined]  # moved along with it

    @classmethod
    def load_settings(cls, name: str, dtype: torch.dtype | str, skip: Sequence[str] = ()) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=name,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(skip) or None,
        )

    @classmethod
    def sample(cls, name: str, inputs: int, outputs: int) -> nn.Module:
        from bitsandbytes.nn import modules

        made: Any = modules.Linear4bit
        return made(inputs, outputs, bias=False, quant_type=name)  # type: ignore[no-any-return]

    @classmethod
    def planned(cls, name: str, shape: tuple[int, int], settings: dict[str, Any] | None = None) -> str:
        nested = settings is None or settings.get("bnb_4bit_use_double_quant", False)
        return layout_text(name, shape, USUAL_BLOCK, USUAL_NESTED if nested else 0)

    @classmethod
    def saved_as(cls, settings: dict[str, Any]) -> str | None:
        return str(settings.get("bnb_4bit_quant_type", "fp4")) if settings.get("load_in_4bit") else None


def _plain(parameter: Tensor) -> Tensor:
    """The parameter as a plain tensor, with its version, unlike .data. Its class takes each call through Python."""
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.detach()


for kind in FourBit.into:
    register_layout(kind, FourBitLayout)
