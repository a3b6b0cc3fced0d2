"""A module that an adapter trains whole: it works on its own copy while the adapter acts."""

import sys
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bases import TO_SKIP, is_quantized, offload_of
from ..config import AdapterConfig, matches
from ..errors import LoraError
from ..exact import How, MergedModule, Undo
from .copies import base_parameters, copy_with_own, deep_copy, materialize_
from .frozen import FrozenLinear
from .host import LoraLayer, adapters_of, base_modules, plain_name, refresh, submodule, take_layer
from .kind import Kind, Line, Part, hosts, no_module, register


class Whole(nn.Module):
    """One adapter's copy of a module. `trained`: the names of its parameters that train; others are the base's own.

    `untied`: of those, the ones whose like in the base is tied to another, from whose copy a file parts them.
    """

    # transformers' save_pretrained writes tensors that share memory once, under the name that fits none of these.
    _tied_weights_keys: ClassVar[dict[str, str]] = {"module": "module"}

    def __init__(self, module: nn.Module, trained: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.trained = trained
        self.untied: tuple[str, ...] = ()


def _by_name(depth: int = 2) -> bool:
    """Whether FSDP or load_state_dict asks, which go by name and mean the base's parameters."""
    if torch.compiler.is_compiling():
        return False
    asker: str = sys._getframe(depth).f_globals.get("__name__", "")
    return asker == "torch.nn.modules.module" or asker.startswith("torch.distributed.")


class Kept(LoraLayer):
    """A module whose parameters nobody may exchange unseen while a copy acts."""

    def _put(self, name: str, value: Any) -> bool:
        """Put a parameter into the copy and say so, where it is the copy's; raise LoraError where it cannot be put."""
        raise NotImplementedError

    def _elsewhere(self, name: str, value: Any) -> bool:
        own = self.__dict__.get("_parameters", ())  # none while it is being copied
        return name in own and not _by_name(3) and self._put(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._elsewhere(name, value):
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if not self._elsewhere(name, None):
            super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if not self._elsewhere(name, param):
            super().register_parameter(name, param)


class InnerLayer(Kept):
    """A module inside one of which a copy acts: it does not run itself."""

    def _put(self, name: str, value: Any) -> bool:
        raise LoraError(
            f"model: {name!r} cannot be exchanged in a module that does not run: an adapter trains a module around "
            "it whole, and its copy acts; lora.activate(model, None) first to change the base"
        )


def _seen(name: str) -> property:
    """The copy's also where FSDP1 has put a plain tensor in the parameter's place, on which nn.Module sets no watch."""

    def read(self: Any) -> Any:
        if not _by_name() and hasattr(own := self.lora.terms[-1].module, name):
            return getattr(own, name)
        if name in self.__dict__:
            return self.__dict__[name]
        raise AttributeError(name)  # then __getattr__ is asked

    return property(read, lambda self, value: self.__dict__.update({name: value}), lambda self: self.__dict__.pop(name))


class WholeLayer(Kept):
    """A module while an adapter's copy of it acts in its place.

    Its parameters, read or assigned by name, are the copy's: for code that reads a weight and does not call the module
    (a fused loss, tied embeddings), and for code that puts another in its place.
    """

    weight, bias = _seen("weight"), _seen("bias")

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__.get("_parameters", ())
        if name in own and not _by_name() and hasattr(copy := self.lora.terms[-1].module, name):
            return getattr(copy, name)
        return super().__getattr__(name)

    def _put(self, name: str, value: Any) -> bool:
        part: Whole = self.lora.terms[-1]
        if name not in part.module._parameters:
            return False
        if value is None and part.module._parameters[name] is not None:
            raise LoraError(
                f"model: {name!r} of a module that an adapter trains cannot be taken away while its copy acts; "
                "lora.remove the adapter, or lora.activate(model, None) first"
            )
        setattr(part.module, name, value)
        return name in part.trained  # what does not train is the base's own, in both

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.lora.terms[-1].module(*args, **kwargs)


@register
class WholeAdapters(Kind):
    """The copies of one module, by adapter."""

    layer = WholeLayer
    by_targets = False
    weight_is_seen = True
    rests = FrozenLinear  # a quantized linear of which an adapter trains the bias
    terms: tuple[Whole, ...]

    def acts(self, host: nn.Module) -> None:
        covered = self.undo is None and any(self.covers(name) for name in self.active)
        for name, module in base_modules(host):
            if name and (covered or isinstance(module, InnerLayer)):
                take_layer(module, InnerLayer if covered else None)

    @classmethod
    def parts(cls, root: nn.Module, targets: dict[str, nn.Module], config: AdapterConfig, loading: bool) -> list[Part]:
        """A copy of each module to train whole, and of each with a bias to train that is no target.

        What the copies share stays shared: tied parameters are tied in the copies, and what does not train is the
        base's own.
        """
        modules = dict(base_modules(root))
        whole = _whole(modules, config, loading)
        biased: dict[str, tuple[str, ...]] = {}
        for name, module in modules.items() if config.bias == "all" else ():
            found = tuple(n for n, p in module._parameters.items() if "bias" in n and p is not None)
            if found and name not in targets and not _inside(name, whole):
                biased[name] = found
        _check(root, modules, whole | biased)
        memo: dict[int, Any] = {}
        copies = [Whole(deep_copy(modules[n], memo), trained) for n, trained in whole.items()]
        copies += [Whole(copy_with_own(modules[n], trained, memo), trained) for n, trained in biased.items()]
        for part in copies if loading else ():
            materialize_(part.module, part.trained)
        return [Part(modules[n], cls, part) for n, part in zip(whole | biased, copies, strict=True)]

    @classmethod
    def trained(cls, part: Whole) -> list[nn.Parameter]:
        own = dict(base_parameters(part.module))
        return [own[name] for name in part.trained]

    @classmethod
    def tensors(cls, part: Whole) -> dict[str, Tensor]:
        module = part.module
        frozen = {plain_name(n) for n, _ in module.named_parameters(remove_duplicate=False)} - set(part.trained)
        state = {plain_name(n): tensor for n, tensor in module.state_dict(keep_vars=True).items()}
        return {name: tensor for name, tensor in state.items() if name not in frozen}

    @classmethod
    def untie(cls, part: Whole, key: str) -> None:
        owner, _, leaf = key.rpartition(".")
        inner = submodule(part.module, owner)
        inner._parameters[leaf] = nn.Parameter(inner.get_parameter(leaf).detach().clone())
        part.untied += (key,)

    @classmethod
    def line(cls, part: Whole) -> Line:
        trained = cls.trained(part)
        return Line(tuple(trained[0].shape), None, sum(p.numel() for p in trained))

    def runs(self, host: nn.Module, plain: torch.dtype | None) -> str:
        return "own copy"

    def check_together(self, name: str, names: list[str]) -> None:
        if len(names) > 1:
            raise LoraError(f"names: {', '.join(names)} each train {name!r} whole, and only one copy can act")

    def covers(self, adapter: str) -> bool:
        return any("." in trained for trained in self[adapter].trained)

    def written(self, host: nn.Module) -> list[Tensor]:
        base = dict(base_parameters(host))
        return [base[key] for key in self.terms[-1].untied]  # the others' copies are tied as they are

    def merged(self, name: str, host: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {n: parameter.detach() for n, parameter in base_parameters(self.terms[-1].module)}

    def merge(self, name: str, host: nn.Module, how: How) -> MergedModule:
        first = self._exchange(host, how)
        self.undo = Undo()  # the host has the copy's values and the copy the host's
        refresh(host)
        return MergedModule(name, tuple(first.shape), first.dtype, 1.0, 0.0)

    def unmerge(self, name: str, host: nn.Module, how: How) -> None:
        self._exchange(host, how)
        self.undo = None
        refresh(host)

    def _exchange(self, host: nn.Module, how: How) -> Tensor:
        """Exchange the values of the base's tensors with those of the acting copy; tied ones only once."""
        copy = self.terms[-1].module
        theirs = {plain_name(n): t for n, t in [*host.named_parameters(), *host.named_buffers()]}
        mine = {plain_name(n): t for n, t in [*copy.named_parameters(), *copy.named_buffers()]}
        own = [(t, theirs[n]) for n, t in mine.items() if t is not theirs[n]]
        pairs = [pair for pair in own if id(pair[0]) not in how.exchanged]
        how.exchanged |= {id(tensor) for tensor, _ in pairs}
        how.journal[host] = partial(_give_back, [(tensor, tensor.data) for pair in pairs for tensor in pair])
        for tensor, other in pairs:
            tensor.data, other.data = other.data, tensor.data
        return own[0][0]


def _give_back(memory: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, data in memory:
        tensor.data = data


def _whole(modules: dict[str, nn.Module], config: AdapterConfig, loading: bool) -> dict[str, tuple[str, ...]]:
    """The modules that `train` names, and the names of their parameters."""
    whole: dict[str, tuple[str, ...]] = {}
    leaves = [name.rpartition(".")[2] for name in modules]
    for entry in config.train:
        fits = [name for name in modules if name and matches([entry], name)]
        if not fits and not loading:
            raise LoraError(f"train: {entry!r} fits no module{no_module(modules, entry, leaves)}")
        for name in fits:
            own = dict(base_parameters(modules[name]))
            whole[name] = tuple(own)
            quantized = any(is_quantized(module) for _, module in base_modules(modules[name]))
            if quantized or not all(p.is_floating_point() for p in own.values()):
                raise LoraError(
                    f"train: {name!r} is quantized and cannot be trained whole; name it in targets, or load the model "
                    f"with it in {TO_SKIP}"
                )
            if not own:
                raise LoraError(f"train: {name!r}, a {type(modules[name]).__name__}, has no parameters to train")
    return {n: own for n, own in whole.items() if not _inside(n, whole.keys() - {n})}  # an outer copy has the others


def _inside(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def _check(root: nn.Module, modules: dict[str, nn.Module], chosen: dict[str, tuple[str, ...]]) -> None:
    trained = {
        id(p): f"{name}.{n}" for name, names in chosen.items() for n, p in base_parameters(modules[name]) if n in names
    }
    for name, names in chosen.items():
        held = [m for _, m in base_modules(modules[name]) if offload_of(m)] if any("." in n for n in names) else []
        if held or offload_of(modules[name]):
            raise LoraError(
                f"train or bias='all': {name!r} is offloaded by accelerate, so that a copy of it would have no values; "
                "keep it on a device (device_map), or leave it out"
            )
        if hasattr(modules[name], "lora") and adapters_of(modules[name]) is None:
            raise LoraError(f"train: {name!r} has an attribute `lora` that is not ours; rename it")
        for inner, _, adapters in hosts(modules[name]):
            within = bool(inner) and any("." in n for n in names)  # a bias of its own leaves the children alone
            if within or (not inner and not isinstance(adapters, WholeAdapters)):
                raise LoraError(
                    f"train or bias='all': {name!r} carries a part of adapter {', '.join(adapters.records)} "
                    f"({inner or 'itself'}), which a copy of it would leave out; train something else, or remove that"
                )
    inside = {f"{name}.{n}" for name, names in chosen.items() for n in names}
    for owner, module in modules.items():
        for n, p in module._parameters.items():
            if p is not None and id(p) in trained and f"{owner}.{n}" not in inside:
                raise LoraError(
                    f"train: {trained[id(p)]!r} is tied to '{owner}.{n}', and training one alone would part them; "
                    f"name both, train=[..., {owner!r}], or untie them first"
                )
