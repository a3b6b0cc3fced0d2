"""What somebody else adds to the library from one file: a kind of host, an update and a format of frozen weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import bilinear, dropout

from lora import bases, layers, updates
from lora.layers.matrix import MatrixKind, apart
from lora.ops import as_dtype, summed_bias
from lora.ops.dequantize import Layout, layout_text, register_layout, unregister_layout

# A kind of host: nn.Bilinear, y_k = x1 W_k x2 + b_k, whose W (out, in1, in2) is seen as a matrix (out, in1 * in2).


class BilinearWeight(bases.Dense):
    package, classes, role = "torch.nn.modules.linear", ("Bilinear",), "bilinear"

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return super().dense(dtype).view(self.module.out_features, -1)


class LoraBilinear(layers.LoraLayer):
    """A (r, in1 * in2) is a small bilinear layer of its own, and B (out, r) a linear on top of it."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        adapters: Any = self.lora
        y, pairs = apart(bilinear(x1, x2, self.weight), adapters.terms, adapters.frozen)
        for term, (A, B, s) in pairs:
            x = dropout(x1, term.dropout, self.training)
            h = bilinear(x, x2, as_dtype(A, y.dtype).view(-1, *self.weight.shape[1:]))
            y = y + s * h @ as_dtype(B, y.dtype).t()
        bias = summed_bias(self._parameters["bias"], adapters.terms)
        return y if bias is None else y + as_dtype(bias, y.dtype)


class BilinearAdapters(MatrixKind):
    layer, role = LoraBilinear, "bilinear"
    keys: ClassVar[dict[str, str]] = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "base_layer.bias"}

    def runs(self, host: nn.Module, plain: torch.dtype | None) -> str:
        return "bilinear"


# An update: W = (1 + g) (W0 + s B A), with a trained gain for each output, as (IA)^3 has it (arXiv:2205.05638).


class Gained(updates.LowRank):
    name, scales = "gained", True

    def __init__(self, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0, bias: Tensor | None = None) -> None:
        super().__init__(A, B, scaling, dropout, bias)
        self.lora_gain = nn.Parameter(torch.zeros_like(B[:, 0]))

    def output_scale(self, weight: bases.FrozenWeight, dtype: torch.dtype = torch.float32) -> Tensor:
        return 1 + self.lora_gain.to(dtype)


# A format: int4 by row, two weights a byte, the first in the high nibble, 8 more than it stands for; fp16 scales.


@dataclass(frozen=True)
class RowLayout(Layout):
    @property
    def parts(self) -> list[tuple[int, torch.dtype | None]]:
        return [(self.shape[0] * self.shape[1] // 2, torch.uint8), (self.shape[0], torch.float16)]

    def dense(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        codes = torch.stack([parts[0] >> 4, parts[0] & 15], -1).view(self.shape).float() - 8
        return (codes * parts[1].float()[:, None]).to(dtype)

    def element(self, parts: Sequence[Tensor], row: int, column: int) -> Tensor:
        byte = parts[0][row, column // 2]
        return ((byte & 15 if column % 2 else byte >> 4).float() - 8) * parts[1][row].float()


class RowLinear(nn.Module):
    """A linear over such a weight. In plain torch it is not differentiable in a dtype but its own."""

    def __init__(self, values: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = values.shape
        codes, scale = quantize(values)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        form = RowLayout("int4_rows", (self.out_features, self.in_features))
        return nn.functional.linear(x, form.dense([self.weight, self.scale], x.dtype), self.bias.to(x.dtype))


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = (values.abs().amax(1) / 7).half()
    codes = (values / scale.float()[:, None]).round().clamp(-8, 7).to(torch.uint8) + 8
    return codes[:, ::2] << 4 | codes[:, 1::2], scale


class RowWeight(bases.Quantized):
    package, classes = __name__, ("RowLinear",)
    into = ("int4",)
    quantization = "int4"
    label = "int4 by row"
    note = "int4: a note of its own"
    dtype = torch.float16

    def stored(self) -> bases.Stored:
        return [self.parameter.detach(), self.module.scale], layout_text("int4_rows", self.shape)

    def attributes(self) -> dict[str, Any]:
        return {"scale": self.module.scale}

    def quantized(self, values: Tensor) -> tuple[Tensor, dict[str, Any]]:
        codes, scale = quantize(values)
        return nn.Parameter(codes, requires_grad=False), {"scale": scale}


@contextmanager
def registered() -> Iterator[None]:
    """The library with all three, and without them again."""
    register_layout("int4_rows", RowLayout)
    for weight in (RowWeight, BilinearWeight):
        bases.register(weight)
    layers.register(BilinearAdapters)
    updates.register(Gained)
    try:
        yield
    finally:
        updates.unregister(Gained)
        layers.unregister(BilinearAdapters)
        for weight in (RowWeight, BilinearWeight):
            bases.unregister(weight)
        unregister_layout("int4_rows")
