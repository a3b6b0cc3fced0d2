"""Quantized linears that are only planned: of the layout that a format will give them, and without values.

They stand on the meta device where memory is estimated, so that neither the weights nor the package that quantizes them
need be there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ops.dequantize import layout
from .weight import Quantized, Stored, register, unregister


class PlannedLinear(nn.Module):
    """format: `str(ops.dequantize.Layout)`; dtype: of the products with the weight."""

    def __init__(self, format: str, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.dtype = format, dtype
        self.out_features, self.in_features = layout(format).shape
        first, *others = [torch.empty(n, dtype=kind or torch.uint8, device="meta") for n, kind in layout(format).parts]
        whole = first.numel() == self.out_features * self.in_features  # and not several weights to a byte
        self.weight = nn.Parameter(first.view(layout(format).shape) if whole else first, requires_grad=False)
        for i, part in enumerate(others):
            self.register_buffer(f"part{i}", part)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))


class Planned(Quantized):
    """The weight of a `PlannedLinear`."""

    package, classes = __name__, ("PlannedLinear",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.quantization = layout(self.module.format).kind

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype  # type: ignore[no-any-return]

    def stored(self) -> Stored:
        return [self.parameter.detach(), *self.module._buffers.values()], self.module.format


@contextmanager
def planned() -> Iterator[None]:
    """Within it, they are linears like any other."""
    register(Planned)
    try:
        yield
    finally:
        unregister(Planned)
