"""What a merge refuses, and how much of an update it kept."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import LoraError
from ..layers import LinearAdapters
from ..layers.host import Adapters, base_modules

Place = tuple[str, nn.Module, Adapters]
"""full name, host, its adapters"""


def check_finite(places: Iterable[Place]) -> None:
    for name, _, adapters in places:
        for adapter in adapters.active:
            for parameter_name, parameter in adapters[adapter].named_parameters():
                if parameter.is_meta:
                    raise LoraError(f"model: {name!r} is on the meta device and has no values; load them, then merge")
                if not torch.isfinite(parameter).all():
                    raise LoraError(
                        f"model: {parameter_name} of adapter {adapter!r} on {name!r} has NaN or infinity; nothing was "
                        "merged. Train again from the last good adapter, or lora.remove this one"
                    )


def check_places(root: nn.Module, places: Iterable[Place]) -> None:
    """Refuse weights that a merge cannot write, or that someone else would see change."""
    owners: dict[int, list[tuple[str, Tensor]]] = {}
    for name, module in base_modules(root):
        for own_name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                owners.setdefault(parameter.untyped_storage().data_ptr(), []).append((f"{name}.{own_name}", parameter))
    for name, host, adapters in places:
        if not isinstance(adapters, LinearAdapters):
            continue
        written: list[Tensor] = [adapters.frozen.parameter]
        if written[0].is_meta:
            raise LoraError(f"model: the weight of {name!r} is on the meta device; load it, then merge")
        if adapters.quantized:
            written = []  # it is replaced, and whoever shares it keeps it
        elif any(step == 0 and length > 1 for step, length in zip(written[0].stride(), written[0].shape, strict=True)):
            raise LoraError(f"model: the weight of {name!r} is an expanded view; give the module a tensor of its own")
        if any(term.bias is not None for term in adapters.terms):
            written.append(host.get_parameter("bias"))
        for tensor in written:
            tied = [other for other, p in owners[tensor.untyped_storage().data_ptr()] if _overlap(tensor, p)]
            if len(tied) > 1:
                raise LoraError(
                    f"model: {' and '.join(tied)} are tied (they share memory), and merging would change both; untie "
                    "them first (a clone of the tensor for one of them), or keep the adapter unmerged"
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage lie over each other."""

    def end(t: Tensor) -> int:
        last = sum((length - 1) * step for length, step in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr() + (last + 1) * t.element_size()

    return one.data_ptr() < end(other) and other.data_ptr() < end(one)


def refuse_overflow(name: str, values: Tensor, stored: str | None = None) -> None:
    """`stored`: how the values are held, where that is not their dtype."""
    if not torch.isfinite(values).all():
        held = stored or str(values.dtype).removeprefix("torch.")
        raise LoraError(
            f"model: merging {name!r} gives NaN or infinity in {held}; nothing was changed. The "
            "base's weight has such values already, or the sum is too large for the dtype: then merge into a float32 "
            "copy"
        )


def moments(change: Tensor, update: Tensor) -> Tensor:
    """(3,) float64 on the CPU: <C, D>, <D, D> and |C - D|^2 of what became of an update D; blocks of rows add."""
    c, d = change.double(), update.double()
    return torch.stack([(c * d).sum(), d.square().sum(), (c - d).square().sum()]).cpu()


def kept_and_noise(sums: Tensor) -> tuple[float, float]:
    """The share of the update that was kept along its own direction, and the size of the error beside the update's."""
    along, norm, lost = sums.tolist()
    return (along / norm, math.sqrt(lost / norm)) if norm else (1.0, 0.0)


def changed(name: str, dtype: torch.dtype, before: torch.dtype | None) -> LoraError:
    was = "" if before is None else f"was {before} and "
    return LoraError(
        f"model: {name!r} cannot be unmerged: its weight, bias, A or B changed after the merge (trained, loaded or "
        f"cast; it {was}is {dtype}). Put the values back, or load the base model again"
    )
