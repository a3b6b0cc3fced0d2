"""What hosts have in common whose operation is one frozen matrix W0 (out, in), read through a `FrozenWeight`."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import exact
from ..bases import FrozenWeight, brought, keeps_forward, other_quantizer, weight_of
from ..config import AdapterConfig
from ..errors import LoraError
from ..exact import How, MergedModule
from ..ops import scale_output
from ..updates import Change, Pair, Start, Update, update_named
from .host import adapters_of, original_class, refresh
from .kind import Kind, Line, Part, kind_of, supported


class MatrixKind(Kind):
    """The updates of one matrix."""

    role: ClassVar[str]  # which frozen weights are of this kind: `FrozenWeight.role`
    keys: ClassVar[dict[str, str]]  # names in a file of the update's A and B, and of the trained bias
    halved = True
    zero: ClassVar[str] = "B"  # the half of a fresh update that is zero
    terms: tuple[Update, ...]
    scaled: bool = False  # whether an acting update has an output scale

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        weight = self.weight(host)
        assert weight is not None, type(host)
        self.frozen, self.quantization = weight, weight.quantization
        self.quantized = weight.quantization is not None

    def acts(self, host: nn.Module) -> None:
        self.scaled = any(term.scales for term in self.terms)

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        return cls.weight(module) is not None

    @classmethod
    def weight(cls, host: nn.Module) -> FrozenWeight | None:
        return weight_of(host, cls.role)

    @classmethod
    def check(cls, model: nn.Module, name: str, module: nn.Module) -> None:
        """Refuse a module whose forward would not be what the library takes it for, or whose weight cannot be used."""
        kind: Any = original_class(module)
        if not keeps_forward(kind, cls.role):
            raise LoraError(
                f"targets: {name!r} is a {kind.__module__}.{kind.__qualname__}, which has a forward of its own; "
                f"{supported()}, and subclasses that keep their forward{other_quantizer(module)}"
            )
        frozen: Any = cls.weight(module)
        weight: Any = module._parameters.get("weight")
        plain = frozen.quantization is None
        computed = [n for n in ("weight", "bias") if n not in module._parameters and hasattr(module, n)]
        if plain and computed:
            raise LoraError(
                f"targets: the {computed[0]} of {name!r} is computed from other parameters (weight_norm, a "
                "parametrization), so nothing can be merged into it; "
                "torch.nn.utils.parametrize.remove_parametrizations makes it a plain one"
            )
        if plain and is_lazy(weight):
            raise LoraError(f"targets: {name!r} is lazy and has no shape yet; run the model once, then inject")
        if other := other_quantizer(module):
            raise LoraError(f"targets: {name!r} cannot be adapted; {supported()}{other}")
        frozen.check()
        if plain and (not weight.is_floating_point() or weight.element_size() < 2):
            raise LoraError(
                f"targets: the weight of {name!r} is {weight.dtype}; supported are floats of 16 bits or more"
            )
        if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
            raise LoraError(
                f"targets: {name!r} has had its forward replaced on the instance, and an adapter would be passed by; "
                "inject before whatever replaces it"
            )

    @classmethod
    def parts(cls, root: nn.Module, targets: dict[str, nn.Module], config: AdapterConfig, loading: bool) -> list[Part]:
        """A fresh update for each target of this kind, with a bias of its own where the config trains biases."""
        if (own := config.matrices) is None:
            return []
        update, parts = update_named(own.update), []
        for name, module in targets.items():
            if kind_of(module) is not cls:
                continue
            if hasattr(module, "lora") and not isinstance(adapters_of(module), cls):
                raise LoraError(
                    f"targets: {name!r} has an attribute `lora` that is not ours, or is trained whole already (by an "
                    "adapter's train=[...] or bias='all')"
                )
            weight: Any = cls.weight(module)
            init = None if loading else own.init
            start = Start(own.rank(name), own.scaling(name), own.dropout, init, cls.zero)
            part = update.fresh(weight, start)
            bias = module._parameters.get("bias")
            if own.bias != "none" and bias is not None:
                device = part.pairs()[0][0].device
                with brought(module):
                    values = torch.empty(bias.shape) if loading else module.get_parameter("bias").detach()
                    part.bias = nn.Parameter(values.to(device, torch.float32, copy=True))
            parts.append(Part(module, cls, part))
        return parts

    @classmethod
    def tensors(cls, part: Update) -> dict[str, Tensor]:
        return {cls.keys.get(name, name): tensor for name, tensor in part.tensors().items()}

    @classmethod
    def line(cls, part: Update) -> Line:
        A, B, _ = part.pairs()[0]
        r = part.r if part.shift(None) is None else None
        return Line((B.shape[0], A.shape[1]), r, sum(p.numel() for p in part.parameters()), part.note)

    def check_merge(self, name: str, host: nn.Module, into: str | None) -> None:
        if any(term.shift(None) is not None for term in self.terms):
            raise LoraError(
                f"model: {', '.join(self.active)} adds to the bias of {name!r} beside a scale, which is not merged; "
                "lora.activate other adapters alone to merge these"
            )
        exact.check_into(name, self.frozen, into)
        weight = self.frozen.parameter
        if weight.is_meta:
            raise LoraError(f"model: the weight of {name!r} is on the meta device; load it, then merge")
        expanded = any(step == 0 and length > 1 for step, length in zip(weight.stride(), weight.shape, strict=True))
        if expanded and not self.quantized:
            raise LoraError(f"model: the weight of {name!r} is an expanded view; give the module a tensor of its own")

    def written(self, host: nn.Module) -> list[Tensor]:
        tensors = [] if self.quantized else [self.frozen.parameter]  # one that is replaced stays whole for others
        if any(term.bias is not None for term in self.terms):
            tensors.append(host.get_parameter("bias"))
        return tensors

    def merged(self, name: str, host: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
        if self.quantized:
            return exact.sum_replaced(name, host, self.frozen, self.terms, dtype)
        return exact.sum_dense(name, host, self.frozen, self.terms)

    def merge(self, name: str, host: nn.Module, how: How) -> MergedModule:
        if self.quantized:
            report, self.undo = exact.merge_replaced(name, host, self.frozen, self.terms, how)
        else:
            report, self.undo = exact.merge_dense(name, host, self.frozen, self.terms, how.journal)
        refresh(host)
        return report

    def unmerge(self, name: str, host: nn.Module, how: How) -> None:
        if isinstance(self.undo, exact.Replaced):
            exact.unmerge_replaced(name, host, self.frozen, self.terms, self.undo)
        else:
            assert isinstance(self.undo, exact.DenseUndo)
            exact.unmerge_dense(name, host, self.frozen, self.terms, self.undo, how.journal)
        self.undo = None
        refresh(host)

    def leave(self, host: nn.Module) -> bool:
        undo, self.undo = self.undo, None
        if not isinstance(undo, exact.Replaced) or undo.merged_class is None:
            return False
        self.original, self.resting_layer = undo.leave(host), None
        return True

    def notes(self) -> list[str]:
        return [self.frozen.note] if self.frozen.note else []


def refuse_replica(host: nn.Module) -> None:
    if "_is_replica" in host.__dict__:
        raise LoraError("model: nn.DataParallel is not supported; use DistributedDataParallel or one GPU")


def apart(
    y: Tensor, terms: tuple[Update, ...], frozen: FrozenWeight, bias: Tensor | None = None
) -> tuple[Tensor, list[tuple[Update, Pair]]]:
    """The base's product y, which has the bias in it, under several updates, and the low-rank terms to add to it."""
    made = Change(terms, [term.output_scale(frozen) for term in terms])
    pairs = [(term, pair) for term, its in zip(terms, made.pairs, strict=True) for pair in its]
    return y if made.scale is None else stretched(y, made.scale, bias), pairs


def stretched(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """scale * (y - bias) + bias, where 1 changes no bit of y; a bias added after the product would be rounded twice."""
    return scale_output(y, scale, None if bias is None else (1 - scale) * bias)
