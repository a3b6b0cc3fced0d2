"""inject: put a new adapter into a model, in place."""

import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from .atomic import alone, whole_or_not
from .bases import allow_training, offload_of
from .config import AdapterConfig, LoraConfig, check_name
from .errors import LoraError, LoraWarning, ends
from .layers import KINDS, Adapter, Part, Watch, base_modules, hosts, tell_fresh, tell_stacked
from .layers.copies import base_parameters
from .layers.frozen import settle
from .layers.host import attach
from .resident import activate_all, check_root, refuse_merged, resident, unwrap
from .targets import left_in, select

ModelT = TypeVar("ModelT", bound=nn.Module)


def inject(model: ModelT, *, config: LoraConfig | None = None, name: str = "default", **keywords: Any) -> ModelT:
    """Give the model a new low-rank adapter (arXiv:2106.09685), freeze the base, make the adapter act alone.

    Args:
        model: any nn.Module; changed in place. Its modules stay the same objects, its state-dict keys stay.
        config: a LoraConfig, or its fields as keywords: `r, targets, alpha, dropout, bias, init, rslora,
            exclude, layers, rank_pattern, alpha_pattern, train, update, dora`.
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
    with alone():
        adapter = new_adapter(root, check_name(name), config)
        targets = select(root, config)
        if config.targets is None:
            found = list(ends(targets, [name for name, _ in base_modules(root)]))
            warnings.warn(f"targets: None picked {found}; name them to silence this", LoraWarning, stacklevel=2)
        tell_fresh(root, config)
        tell_stacked(root, config, lambda name: left_in(config, name))
        whole_or_not(root, lambda _: _new(root, adapter, targets))
    return model


def new_adapter(root: nn.Module, name: str, config: AdapterConfig, extra: dict[str, Any] | None = None) -> Adapter:
    """The record of an adapter to be, after the checks that need no module."""
    others = resident(root)
    check_root(root)
    if torch.is_inference_mode_enabled():
        raise LoraError("model: under torch.inference_mode() nothing can train; leave it (torch.no_grad() is fine)")
    if name in others:
        raise LoraError(
            f"name: the model already has an adapter {name!r}; give another name=, or lora.remove(model, {name!r})"
        )
    refuse_merged(root)
    _refuse_peft(root)
    if any(hasattr(p, "full_tensor") for _, module in base_modules(root) for p in module._parameters.values()):
        warnings.warn(
            "model: FSDP2 has sharded it and knows nothing of the A and B that come now, so nobody averages their "
            "gradients over the processes; inject first and shard then, or average them yourself",
            LoraWarning,
            stacklevel=3,
        )
    first = next(iter(others.values()), None)
    before = first.trainable_before if first else frozenset(n for n, p in base_parameters(root) if p.requires_grad)
    return Adapter(name, config, before, extra or {})


def _refuse_peft(root: nn.Module) -> None:
    """Refuse a model inside PEFT's, in which targets would be the modules of its adapters too."""
    theirs = next((m for _, m in base_modules(root) if type(m).__module__.partition(".")[0] == "peft"), None)
    if theirs is not None:
        raise LoraError(
            f"model: it is wrapped by PEFT (a {type(theirs).__name__}), and an adapter on top of another's would train "
            "and be saved under its names; model = model.unload() first, and lora.load(model, PATH) reads PEFT's files"
        )


def _new(root: nn.Module, adapter: Adapter, targets: dict[str, nn.Module]) -> None:
    install(root, adapter, fresh_parts(root, targets, adapter.config, loading=False), trainable=True)


def fresh_parts(root: nn.Module, targets: dict[str, nn.Module], config: AdapterConfig, loading: bool) -> list[Part]:
    """The adapter's parts of every kind of host; when loading, with nothing drawn.

    A part inside a module of which another adapter has a copy is refused: while the copy acts, nothing reaches it.
    """
    parts = [part for kind in KINDS for part in kind.parts(root, targets, config, loading)]
    around = [(name, adapters) for name, host, adapters in hosts(root) if len(host._modules) > 1]  # not `lora` alone
    covered = {name: a for name, adapters in around for a in adapters.records if adapters.covers(a)}
    mine = {part.host for part in parts}
    _check_offloaded(root, mine)
    for name in [name for name, module in base_modules(root) if module in mine] if covered else ():
        for outer, adapter in covered.items():
            if name.startswith(f"{outer}."):
                raise LoraError(
                    f"targets, train or bias: {name!r} is inside {outer!r}, trained whole by adapter {adapter!r}, and "
                    "would never run beside it; leave it out, or lora.remove that adapter first"
                )
    return parts


def _check_offloaded(root: nn.Module, mine: set[nn.Module]) -> None:
    """Refuse hosts in a module whose whole content accelerate brings by name, and would look for A and B there."""
    for outer, module in base_modules(root):
        if (hook := offload_of(module)) is not None and hook.place_submodules:
            for name, inner in base_modules(module):
                if inner in mine:
                    raise LoraError(
                        f"model: {name or 'itself'!r} is inside {outer!r}, which accelerate offloads as one and with "
                        "it what is put in later; dispatch the model without preload_module_classes, then inject"
                    )


def install(root: nn.Module, adapter: Adapter, parts: list[Part], trainable: bool) -> None:
    """Attach prepared parts, let them act alone, and watch those that are to train; within `whole_or_not`."""
    adapter.anchor = next(name for name, module in base_modules(root) if module is parts[0].host)
    if not resident(root):
        root.requires_grad_(False)
    allow_training(root, True)
    for host, kind, part in parts:
        attach(host, kind, adapter, part)
        for parameter in kind.trained(part):
            parameter.requires_grad_(trainable)
    settle(root, carries=True)
    for kind in KINDS:
        kind.arrange((name, host, adapters) for name, host, adapters in hosts(root) if type(adapters) is kind)
    activate_all(root, [adapter.name])
    if trainable:
        Watch(root, adapter.name, parts)
