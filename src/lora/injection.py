"""inject: put a new adapter into a model, in place."""

import copy
import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from .config import LoraConfig, check_name, matches
from .errors import LoraError, LoraWarning, near
from .layers import Adapter, Adapters, LinearAdapters, LowRank, Whole, WholeAdapters
from .layers.base import adapters_of, attach, base_modules, hosts
from .resident import activate_all, resident, unwrap
from .targets import check_called, default_targets, select
from .weights import weight_of

ModelT = TypeVar("ModelT", bound=nn.Module)
Part = tuple[nn.Module, type[Adapters], nn.Module]
"""host, kind of host, the adapter's part on it"""


def inject(model: ModelT, *, config: LoraConfig | None = None, name: str = "default", **keywords: Any) -> ModelT:
    """Give the model a new low-rank adapter (arXiv:2106.09685), freeze everything else, make the adapter act alone.

    Args:
        model: any nn.Module; changed in place. Its modules stay the same objects, its state-dict keys stay.
        config: a LoraConfig, or its fields as keywords: `r, targets, alpha, dropout, bias, init, rslora,
            exclude, layers, rank_pattern, alpha_pattern, train`.
        name: the adapter's name, `[A-Za-z0-9_-]{1,64}`.

    Returns:
        The same model. A and B are fp32, on their weight's device; a fresh adapter changes no output.

    Raises:
        LoraError: a wrong setting, a target or pattern that fits nothing, a name in use, a merged model.
            The model is then as it was.
    """
    if config is not None and keywords:
        raise LoraError(f"config: got one and also {', '.join(keywords)}; give either a LoraConfig or its fields")
    config = config or LoraConfig.of(**keywords)
    root = unwrap(model)
    adapter = new_adapter(root, check_name(name), config)
    targets = select(root, config)
    for host_name, _, _ in hosts(root, WholeAdapters):
        for target in targets:
            if target.startswith(host_name + "."):
                raise LoraError(f"targets: {target!r} is inside {host_name!r}, which another adapter trains whole")
    if config.targets is None:
        chosen = default_targets(targets)
        warnings.warn(f"targets: None picked {chosen}; name them to silence this", LoraWarning, stacklevel=2)
    parts = low_rank_parts(targets, config) + whole_parts(root, targets, config)
    install(root, adapter, parts, trainable=True)
    return model


def new_adapter(root: nn.Module, name: str, config: LoraConfig, extra: dict[str, Any] | None = None) -> Adapter:
    """The record of an adapter to be, after the checks that need no module."""
    others = resident(root)
    if name in others:
        raise LoraError(
            f"name: the model already has an adapter {name!r}; give another name=, or lora.remove(model, {name!r})"
        )
    if any(adapters.undo is not None for _, _, adapters in hosts(root)):
        raise LoraError("model: its adapters are merged into the weights; call lora.unmerge(model) first")
    if others:
        before = next(iter(others.values())).trainable_before
    else:
        before = frozenset(n for n, p in root.named_parameters() if p.requires_grad)
    return Adapter(name, config, before, extra or {})


def low_rank_parts(targets: dict[str, nn.Module], config: LoraConfig, loading: bool = False) -> list[Part]:
    """A fresh LowRank for each target; when loading, one with nothing drawn."""
    parts: list[Part] = []
    for name, module in targets.items():
        if hasattr(module, "lora") and not isinstance(adapters_of(module), LinearAdapters):
            raise LoraError(f"targets: {name!r} has an attribute `lora` that is not ours, or is trained whole already")
        weight = weight_of(module)
        assert weight is not None
        init = None if loading else config.init
        part = LowRank.fresh(weight, config.rank(name), config.scaling(name), config.dropout, init)
        bias = getattr(module, "bias", None)
        if config.bias != "none" and bias is not None:
            start = (
                torch.empty(bias.shape, device=part.B.device) if loading else bias.detach().to(torch.float32, copy=True)
            )
            part.bias = nn.Parameter(start)
        parts.append((module, LinearAdapters, part))
    return parts


def whole_parts(
    root: nn.Module, targets: dict[str, nn.Module], config: LoraConfig, loading: bool = False
) -> list[Part]:
    """A copy of each module to train whole, and of each with a bias to train that is no target.

    What the copies share stays shared: tied parameters are tied in the copies, and what does not train is the
    base's own.
    """
    modules = dict(base_modules(root))
    chosen: dict[str, tuple[str, ...]] = {}
    for entry in config.train:
        fits = [name for name in modules if name and matches([entry], name)]
        if not fits and not loading:
            raise LoraError(f"train: {entry!r} fits no module{near(entry, (n.rpartition('.')[2] for n in modules))}")
        for name in fits:
            chosen[name] = tuple(n for n, _ in modules[name].named_parameters())
    inner = [name for name in chosen if any(name.startswith(other + ".") for other in chosen)]
    for name in inner:  # the outer copy has it
        del chosen[name]
    if config.bias == "all":
        for name, module in modules.items():
            biases = tuple(n for n, p in module._parameters.items() if "bias" in n and p is not None)
            if biases and name not in targets and not any(name == n or name.startswith(n + ".") for n in chosen):
                chosen[name] = biases
    _check_whole(root, modules, chosen)
    memo = _shared(modules, chosen)
    return [(modules[n], WholeAdapters, Whole(_bare_copy(modules[n], memo), t)) for n, t in chosen.items()]


def _bare_copy(host: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a module as its base made it, without the adapters that it may carry."""
    adapters = adapters_of(host)
    if adapters is None:
        return copy.deepcopy(host, memo)
    memo[id(adapters)] = None
    bare = copy.deepcopy(host, memo)
    bare.__class__ = adapters.original
    del bare._modules["lora"]
    return bare


def install(root: nn.Module, adapter: Adapter, parts: list[Part], trainable: bool) -> None:
    """Attach prepared parts; nothing here can fail half-way."""
    root.requires_grad_(False) if not resident(root) else None
    for host, kind, part in parts:
        attach(host, kind, adapter, part)
        part.requires_grad_(False)
        for name, parameter in part.named_parameters():
            if not isinstance(part, Whole) or name.removeprefix("module.") in part.trained:
                parameter.requires_grad_(trainable)
    activate_all(root, [adapter.name])


def _shared(modules: dict[str, nn.Module], chosen: dict[str, tuple[str, ...]]) -> dict[int, Any]:
    """The memo for deepcopy: parameters that do not train are handed over, not copied."""
    return {
        id(p): p for name, trained in chosen.items() for n, p in modules[name].named_parameters() if n not in trained
    }


def _check_whole(root: nn.Module, modules: dict[str, nn.Module], chosen: dict[str, tuple[str, ...]]) -> None:
    trained = {
        id(p): f"{name}.{n}"
        for name, names in chosen.items()
        for n, p in modules[name].named_parameters(remove_duplicate=False)
        if n in names
    }
    for name in chosen:
        check_called(root, "train or bias='all'", name)
        for inner, _, adapters in hosts(modules[name]):
            if inner or not isinstance(adapters, WholeAdapters):
                raise LoraError(
                    f"train: {name!r} carries low-rank updates of adapter {', '.join(adapters.records)}; "
                    "one module takes either these or whole training"
                )
    for owner, module in modules.items():
        if any(owner == name or owner.startswith(name + ".") for name in chosen):
            continue
        for n, p in module._parameters.items():
            if p is not None and id(p) in trained:
                raise LoraError(
                    f"train: {trained[id(p)]!r} is tied to '{owner}.{n}', and training one alone would part them; "
                    f"name both, train=[..., {owner!r}], or untie them first"
                )
