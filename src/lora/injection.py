"""inject: put a new adapter into a model, in place."""

import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from .bases.quantizer import allow_training
from .bases.weight import weight_of
from .config import LoraConfig, check_name, matches
from .errors import LoraError, LoraWarning, near
from .layers import Adapter, Adapters, LinearAdapters, LowRank, Whole, WholeAdapters
from .layers.frozen import FrozenLinear, is_quantized, settle
from .layers.groups import form_groups
from .layers.host import acting_class, adapters_of, attach, base_modules, hosts, original_class, take_class
from .resident import activate_all, check_root, resident, unwrap
from .targets import check_called, default_targets, select

ModelT = TypeVar("ModelT", bound=nn.Module)
Part = tuple[nn.Module, type[Adapters], nn.Module]
"""host, kind of host, the adapter's part on it"""


def inject(model: ModelT, *, config: LoraConfig | None = None, name: str = "default", **keywords: Any) -> ModelT:
    """Give the model a new low-rank adapter (arXiv:2106.09685), freeze the base, make the adapter act alone.

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
    root = unwrap(model, changing=True)
    adapter = new_adapter(root, check_name(name), config)
    targets = select(root, config)
    if config.targets is None:
        chosen = default_targets(targets)
        warnings.warn(f"targets: None picked {chosen}; name them to silence this", LoraWarning, stacklevel=2)
    parts = low_rank_parts(targets, config) + whole_parts(root, targets, config)
    check_reached(root, parts)
    install(root, adapter, parts, trainable=True)
    return model


def new_adapter(root: nn.Module, name: str, config: LoraConfig, extra: dict[str, Any] | None = None) -> Adapter:
    """The record of an adapter to be, after the checks that need no module."""
    others = resident(root)
    check_root(root)
    if config.update != "lora":
        raise LoraError(f"update: got {config.update!r}; allowed is 'lora'")
    if torch.is_inference_mode_enabled():
        raise LoraError("model: under torch.inference_mode() nothing can train; leave it (torch.no_grad() is fine)")
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
    whole: dict[str, tuple[str, ...]] = {}
    for entry in config.train:
        fits = [name for name in modules if name and matches([entry], name)]
        if not fits and not loading:
            raise LoraError(f"train: {entry!r} fits no module{near(entry, (n.rpartition('.')[2] for n in modules))}")
        for name in fits:
            whole[name] = tuple(n for n, _ in _base_parameters(modules[name]))
            if any(is_quantized(module) for _, module in base_modules(modules[name])) or any(
                not p.is_floating_point() for _, p in _base_parameters(modules[name])
            ):
                raise LoraError(
                    f"train: {name!r} is quantized and cannot be trained whole; name it in targets, or load the model "
                    "with it in BitsAndBytesConfig(llm_int8_skip_modules=[...])"
                )
            if not whole[name]:
                raise LoraError(f"train: {name!r}, a {type(modules[name]).__name__}, has no parameters to train")
    for name in [n for n in whole if _inside(n, [other for other in whole if other != n])]:  # the outer copy has it
        del whole[name]
    biased: dict[str, tuple[str, ...]] = {}
    for name, module in modules.items() if config.bias == "all" else ():
        found = tuple(n for n, p in module._parameters.items() if "bias" in n and p is not None)
        if found and name not in targets and not _inside(name, whole):
            biased[name] = found
    _check_whole(root, modules, whole | biased)
    memo: dict[int, Any] = {}
    parts = [Whole(_deep_copy(modules[n], memo), trained) for n, trained in whole.items()]
    parts += [Whole(_copy_with_own(modules[n], trained, memo), trained) for n, trained in biased.items()]
    if loading:
        for part in parts:
            _materialize(part)
    return [(modules[n], WholeAdapters, part) for n, part in zip(whole | biased, parts, strict=True)]


def _base_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The module's parameters without its adapters'; a tied one under each of its names."""
    for prefix, inner in base_modules(module):
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{name}" if prefix else name, parameter


def _inside(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def _deep_copy(host: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a module as its base made it, without the adapters that it may carry."""
    adapters = adapters_of(host)
    if adapters is not None:
        memo[id(adapters)] = None
    return _bare(copy.deepcopy(host, memo), host)


def _copy_with_own(host: nn.Module, own: tuple[str, ...], memo: dict[int, Any]) -> nn.Module:
    """The same module, children and all, but with some parameters of its own."""
    twin = host.__new__(type(host))
    twin.__dict__.update(host.__dict__)
    twin._modules = dict(host._modules)
    twin._parameters = dict(host._parameters)
    for name in own:
        start = host.get_parameter(name)
        twin._parameters[name] = memo.setdefault(id(start), nn.Parameter(start.detach().clone()))
    _bare(twin, host)
    if is_quantized(twin):
        take_class(twin, acting_class(FrozenLinear, original_class(twin)))
    return twin


def _bare(twin: nn.Module, host: nn.Module) -> nn.Module:
    """Take the adapters, hooks and replaced forward off a host's copy: the host itself has them."""
    adapters = adapters_of(host)
    if adapters is not None:
        twin.__class__ = adapters.original
        del twin._modules["lora"]
    for name, value in list(twin.__dict__.items()):
        if name in ("forward", "_old_forward", "_hf_hook"):
            del twin.__dict__[name]
        elif name.startswith(("_forward_", "_backward_")) and isinstance(value, dict):
            twin.__dict__[name] = type(value)()
    return twin


def _materialize(part: Whole) -> None:
    """Room in memory for trained parameters that are on the meta device, before a file fills them."""
    for name in part.trained:
        owner, _, leaf = name.rpartition(".")
        module = part.module.get_submodule(owner)
        parameter = module.get_parameter(leaf)
        if parameter.is_meta:
            module._parameters[leaf] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))


def check_reached(root: nn.Module, parts: list[Part]) -> None:
    """Refuse a part inside a module of which another adapter has a copy: while the copy acts, nothing reaches it."""
    copied = [
        (name, adapter)
        for name, _, adapters in hosts(root, WholeAdapters)
        for adapter in adapters.records
        if any("." in trained for trained in adapters[adapter].trained)
    ]
    mine = {host for host, _, _ in parts}
    for name, module in base_modules(root):
        for outer, adapter in copied:
            if module in mine and name.startswith(outer + "."):
                raise LoraError(
                    f"targets, train or bias: {name!r} is inside {outer!r}, trained whole by adapter "
                    f"{adapter!r}, and would never run beside it; leave it out, or lora.remove that adapter first"
                )


def install(root: nn.Module, adapter: Adapter, parts: list[Part], trainable: bool) -> None:
    """Attach prepared parts; nothing here can fail half-way."""
    for host, kind, _ in parts:
        own = adapters_of(host)
        acting_class(kind.layer, type(host) if own is None else own.original)  # made now: making a class may fail
    if not resident(root):
        root.requires_grad_(False)
    allow_training(root, True)
    names = {module: name for name, module in base_modules(root)}
    adapter.anchor = names[parts[0][0]]
    for host, kind, part in parts:
        attach(host, kind, adapter, part)
        parameters = dict(part.named_parameters(remove_duplicate=False))
        for name in [f"module.{n}" for n in part.trained] if isinstance(part, Whole) else parameters:
            parameters[name].requires_grad_(trainable)
    settle(root, carries=True)
    form_groups(hosts(root, LinearAdapters))
    activate_all(root, [adapter.name])


def _check_whole(root: nn.Module, modules: dict[str, nn.Module], chosen: dict[str, tuple[str, ...]]) -> None:
    trained = {
        id(p): f"{name}.{n}" for name, names in chosen.items() for n, p in _base_parameters(modules[name]) if n in names
    }
    for name, names in chosen.items():
        check_called(root, "train or bias='all'", name)
        if hasattr(modules[name], "lora") and adapters_of(modules[name]) is None:
            raise LoraError(f"train: {name!r} has an attribute `lora` that is not ours; rename it")
        for inner, _, adapters in hosts(modules[name]):
            within = bool(inner) and any("." in n for n in names)  # a bias of its own leaves the children alone
            if within or (not inner and not isinstance(adapters, WholeAdapters)):
                raise LoraError(
                    f"train: {name!r} carries a part of adapter {', '.join(adapters.records)} "
                    f"({inner or 'itself'}), which a copy of it would leave out; train something else whole"
                )
    inside = {f"{name}.{n}" for name, names in chosen.items() for n in names}
    for owner, module in modules.items():
        for n, p in module._parameters.items():
            if p is not None and id(p) in trained and f"{owner}.{n}" not in inside:
                raise LoraError(
                    f"train: {trained[id(p)]!r} is tied to '{owner}.{n}', and training one alone would part them; "
                    f"name both, train=[..., {owner!r}], or untie them first"
                )
