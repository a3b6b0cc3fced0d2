"""A step on the meta device that allocates what the same step would on a card, or on a CPU: no value is computed.

Within `rehearsing`, calls on meta tensors go the ways of eager calls, though a mode watches them; with "cuda" they are
taken for calls on a card, whose kernels `launched` stands in for. Outside of it nothing here has an effect.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Target = Literal["cuda", "cpu"]

target: Target | None = None
"""What meta tensors stand for now."""

named: Callable[[str, Sequence[Tensor]], None] | None = None
"""Told what some tensors are, by those who make them: the copies of A and B, a dense weight."""


@contextmanager
def rehearsing(kind: Target) -> Iterator[None]:
    global target
    before, target = target, kind
    try:
        yield
    finally:
        target = before


def on_card(x: Tensor) -> bool:
    """Whether x stands for a tensor on a card. The kernels then take it, whatever is installed here."""
    return target == "cuda" and x.is_meta


def watched(x: Tensor) -> bool:
    """Whether x is one of a rehearsal, whose dispatch mode is no reason to leave the eager way."""
    return target is not None and x.is_meta


COPIES, DENSE = "copies of A and B", "dense weight"


def name(what: str, tensors: Sequence[Tensor]) -> None:
    if named is not None:
        named(what, tensors)


def device_type(x: Tensor) -> str:
    """What x is on, or stands for."""
    return target if target is not None and x.is_meta else x.device.type


class Launched:
    """The buffers of `launch.py`'s passes, in its order; the kernels' own partial sums, some MB, are left out."""

    @staticmethod
    def hidden(x: Tensor, call: Any) -> Tensor:
        rank = call.A.shape[0]
        name(COPIES, [call.A, *call.B])
        return x.new_empty(x.shape[0], -(-rank // 8) * 8)

    @staticmethod
    def products(x: Tensor, h: Tensor, call: Any, biases: list[Tensor]) -> list[Tensor]:
        ys = []
        for i, b in enumerate(call.B):
            y, weight = x.new_empty(x.shape[0], b.shape[0]), call.matrices[i]
            del weight  # a packed one is dense while it is read
            ys.append(y)
        return ys

    @staticmethod
    def backward(dys: list[Tensor], x: Any, h: Tensor, call: Any, needs_dx: bool) -> list[Tensor]:
        dys = [dy.contiguous() for dy in dys]
        remade = not isinstance(x, Tensor)
        like = x.left if remade else x
        g = like.new_empty(h.shape)
        dA = like.new_empty(call.A.shape, dtype=torch.float32)
        dBs = [like.new_empty(b.shape, dtype=torch.float32) for b in call.B]
        dx = like.new_empty(like.shape) if needs_dx else None
        for i in range(len(dys) if needs_dx else 0):
            weight = call.matrices[i]
            del weight
        copy = torch.empty_like(like) if remade or (call.seed is not None and call.A.shape[0] > 64) else None
        del g, copy  # the input, made again or masked, while dA reads it
        return [dA, *dBs] + ([dx] if dx is not None else [])
