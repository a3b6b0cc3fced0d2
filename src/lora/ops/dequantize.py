"""The dense form of a frozen weight that is stored packed: one operator, `lora::dequantize`, for every layout.

A layout says which tensors hold a weight (out, in) and what they stand for, in plain torch, which is the CPU path and
the oracle; it may have a kernel for CUDA. Layouts are registered by their kind: `bases/` has the library's own, each in
the file of its format.
"""

import functools
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import LoraError
from . import rehearsal
from .library import define

TEXT = re.compile(r"(\w+):(\d+)x(\d+)((?::[1-9]\d*)*)")
Launch = Callable[[Tensor], Tensor]
"""Writes the weight into a tensor (out, in), contiguous, and returns that."""


@dataclass(frozen=True)
class Layout(ABC):
    """How a weight is stored, and in how many tensors; as text, `kind:OUTxIN` and its numbers, such as nf4:64x128:64.

    A subclass is a frozen dataclass too. Its own fields are its numbers, positive or left out.

    Args:
        kind: the name that it was registered by; shape: (out, in).
    """

    forms: ClassVar[tuple[str, ...]] = ("OUTxIN",)  # what may stand behind the kind
    kind: str
    shape: tuple[int, int]

    @property
    @abstractmethod
    def parts(self) -> list[tuple[int, torch.dtype | None]]:
        """Elements and dtype of each tensor that stores such a weight; None: bytes, in any dtype."""

    @abstractmethod
    def dense(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in plain torch, on any device; its memory is the caller's."""

    @abstractmethod
    def element(self, parts: Sequence[Tensor], row: int, column: int) -> Tensor:
        """`dense(parts, float32)[row, column]`, a tensor without dimensions, at the price of a few reads."""

    def launch(self, parts: Sequence[Tensor]) -> Launch | None:
        """What writes the weight on CUDA in place of `dense`, from parts there; None: there is no kernel for it."""
        return None

    def __str__(self) -> str:
        return layout_text(self.kind, self.shape, *(getattr(self, field.name) for field in fields(self)[2:]))


_LAYOUTS: dict[str, type[Any]] = {}


def register_layout(kind: str, layout_class: type[Layout]) -> None:
    """Let weights of this kind be dequantized. Raises `LoraError` where the kind is taken."""
    if kind in _LAYOUTS:
        raise LoraError(f"kind: {kind!r} is a layout already ({_LAYOUTS[kind].__qualname__}); choose another name")
    _LAYOUTS[kind] = layout_class
    layout.cache_clear()


def unregister_layout(kind: str) -> None:
    del _LAYOUTS[kind]
    layout.cache_clear()


@functools.cache
def layout(text: str) -> Layout:
    """The layout that `str` wrote as text. Raises `LoraError` for any other text."""
    match = TEXT.fullmatch(text)
    known = _LAYOUTS.get(match[1]) if match else None
    if match is None or known is None or match[4].count(":") not in {form.count(":") for form in known.forms}:
        allowed = ", ".join(f"{kind}:{form}" for kind, each in _LAYOUTS.items() for form in each.forms)
        raise LoraError(f"format = {text!r}; allowed: {allowed}; write it with str(Layout(...))")
    made: Layout = known(match[1], (int(match[2]), int(match[3])), *map(int, match[4].split(":")[1:]))
    return made


def layout_text(kind: str, shape: tuple[int, int], *numbers: int) -> str:
    """`str(Layout(...))`, for each forward pass: cached nowhere, since what compiled code reads must not grow."""
    return f"{kind}:{shape[0]}x{shape[1]}" + "".join([f":{number}" for number in numbers if number])


class Packed:
    """A stored weight for code that is within an operator already; what can be done once for all its uses is.

    Args:
        parts: the tensors of the layout, in its order, on one device; format: `str(Layout(...))`.

    Raises:
        LoraError: the parts are not of that layout.
    """

    def __init__(self, parts: Sequence[Tensor], format: str) -> None:
        self.parts, self.form = parts, layout(format)
        expected = self.form.parts
        wrong = [
            t for t, (size, dtype) in zip(parts, expected, strict=False)
            if (t.numel() != size or t.dtype != dtype if dtype else t.numel() * t.itemsize != size)
        ]  # fmt: skip
        if wrong or len(parts) != len(expected):
            raise LoraError(
                f"parts = {[(tuple(t.shape), t.dtype) for t in parts]}; allowed for {format}, as elements and dtype "
                f"(None: bytes): {expected}; take them from the weight and its quantization state"
            )
        self._launch: Launch | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), its memory the caller's."""
        first = self.parts[0]
        if first.is_cuda and self._launch is None:
            self._launch = self.form.launch(self.parts)
        if rehearsal.on_card(first):
            out = first.new_empty(self.form.shape, dtype=dtype)
            rehearsal.name(rehearsal.DENSE, [out])
            return out
        if self._launch is None:
            return self.form.dense(self.parts, dtype)
        out = torch.empty(self.form.shape, dtype=dtype, device=first.device)
        with torch.cuda.device_of(out):
            return self._launch(out)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


define(
    "dequantize(Tensor[] parts, str format, ScalarType dtype) -> Tensor",
    lambda parts, format, dtype: Packed(parts, format).dense(dtype),
    lambda parts, format, dtype: parts[0].new_empty(Packed(parts, format).form.shape, dtype=dtype),
)
