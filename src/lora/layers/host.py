"""How an adapter sits on a module: the module stays the same object and takes another class while adapters act.

A host keeps its parameters, its hooks, its state-dict keys and its place in the model. Its adapters are one
submodule, `lora`, whose class is the kind of host (`kind.py`). While at least one of them acts, the host's class is a
subclass of its own class with another `forward`; at rest, merged or disabled, it has its own class again and runs its
bare operation. (A quantized linear has the class `FrozenLinear[...]` then, until the last adapter leaves the model.)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from torch import nn

from ..bases import is_quantized
from ..config import AdapterConfig
from ..exact import Undo
from .askers import refuse_peft, tell_save_pretrained


@dataclass(eq=False)
class Adapter:
    """What all parts of one adapter share. `trainable_before`: the base's trainable parameters before any adapter."""

    name: str
    config: AdapterConfig
    trainable_before: frozenset[str]
    extra: dict[str, Any]  # keys of a loaded adapter_config.json that say nothing to us, kept for saving
    anchor: str = ""  # the full name of its first host, by which the module that it was given to is known again
    told: bool = False  # that save_pretrained does not write it as it acts


class LoraLayer(nn.Module):
    """Mixin: the class that a host takes for a while. Subclasses give `forward`."""

    original: ClassVar[type[nn.Module]]
    lora: "Adapters"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and deepcopy name the classes that it is made of.
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        make, (cls,), *rest = reduced
        ours = _ours(cls)
        made_of = cls.__dict__.get("_made_of", () if cls is ours else (cls, ours))
        return _revive, (make, *made_of, ours.__bases__[0], ours.original), *rest


# Nothing here keeps a class alive: others make one for a single module. Who carries adapters keeps those it had.
_CLASSES: WeakValueDictionary[tuple[type[LoraLayer], type[nn.Module]], type[LoraLayer]] = WeakValueDictionary()
_OVER: WeakValueDictionary[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = WeakValueDictionary()


def acting_class(layer: type[LoraLayer], original: type[nn.Module]) -> type[LoraLayer]:
    """The subclass of `original` that `layer` makes of it; one for each pair, so that compiled code stays valid."""
    made = _CLASSES.get((layer, original))
    if made is None:
        made = type(f"{layer.__name__}[{original.__name__}]", (layer, original), {"original": original})
        _CLASSES[layer, original] = made
    return made


def _ours(cls: type[nn.Module], original: type[nn.Module] | None = None) -> Any:
    """The class among those that one comes from which `acting_class` made, or `original`; None: there is none."""
    return next((c for c in cls.__mro__ if c is original or (issubclass(c, LoraLayer) and "original" in vars(c))), None)


def _revive(make: Any, *classes: Any) -> Any:
    acting = acting_class(*classes[-2:])
    return make(_over(classes[0], classes[1], acting) if len(classes) > 2 else acting)


def _over(present: type[nn.Module], core: type[nn.Module], new: type[nn.Module]) -> type[nn.Module]:
    """The class that somebody else made of `core` (FSDP2, a parametrization), made of `new` in the same way."""
    if present is core:
        return new
    present, core = present.__dict__.get("_made_of", (present, core))  # what was found first, if this is ours
    if new is core:
        return present
    made = _OVER.get((present, new))
    if made is None:
        bases = tuple(_over(b, core, new) if issubclass(b, core) else b for b in present.__bases__)
        body = {k: v for k, v in present.__dict__.items() if k not in ("__dict__", "__weakref__")}
        name = present.__name__.replace(core.__name__, new.__name__)
        made = type(name, bases, {**body, "_made_of": (present, core)})
        for key, value in body.items():
            if isinstance(value, FunctionType) and "__class__" in value.__code__.co_freevars:
                setattr(made, key, _of_class(value, made))
        _OVER[present, new] = made
    return made


def _of_class(method: FunctionType, owner: type) -> FunctionType:
    """A method whose `super()` starts at another class."""
    cells = zip(method.__code__.co_freevars, method.__closure__ or (), strict=True)
    closure = tuple(CellType(owner) if name == "__class__" else cell for name, cell in cells)
    copy = FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, closure)
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy


class Adapters(nn.Module):
    """The adapters of one host, by name. Each kind of host is a subclass: see `kind.Kind`.

    Children are put into `_modules` directly, and attributes never look there: an adapter may have any name, such as
    `forward` or `active`.
    """

    layer: ClassVar[type[LoraLayer]]  # what the host becomes while adapters act
    rests: ClassVar[type[LoraLayer] | None] = None  # what a quantized host is while none acts; None: itself

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.original = original_class(host)
        self.records: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.terms: tuple[Any, ...] = ()  # the active children, for the forward pass
        self.undo: Undo | None = None  # what the unmerge needs; None when not merged
        self.resting_layer = self.rests if is_quantized(host) else None
        self.classes: set[type[nn.Module]] = set()  # that the host had: found again, compiled code stays valid

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "classes": set()}  # a class made at run time cannot be pickled

    def named_modules(self, *args: Any, **keywords: Any) -> Iterator[tuple[str, nn.Module]]:
        refuse_peft(self.records)
        walk: Iterator[tuple[str, nn.Module]] = super().named_modules(*args, **keywords)
        return walk

    def state_dict(self, *args: Any, **keywords: Any) -> Any:
        if self.undo is None:
            tell_save_pretrained(self.records.values())
        return super().state_dict(*args, **keywords)

    def acts(self, host: nn.Module) -> None:
        """Called when others act than before: `terms` are their parts, without effect while `undo` is set."""

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def extra_repr(self) -> str:
        return f"active={list(self.active)}{', merged' if self.undo is not None else ''}"


def adapters_of(module: nn.Module) -> Adapters | None:
    child = module._modules.get("lora")
    return child if isinstance(child, Adapters) else None


# The one child of torch.compile's, checkpoint_wrapper's and FSDP1's module around another.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers that torch puts around one, or the module itself."""
    while len(children := module._modules) == 1:
        ((name, child),) = children.items()
        data_parallel = isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        if child is None or not (name in _WRAPPED or data_parallel):
            break
        module = child
    return module


def plain_name(name: str) -> str:
    """A name of torch's without the names of such wrappers; of data parallelism no module inside a host has one."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of a name as `base_modules` gives it."""
    module = unwrapped(model)
    for part in name.split(".") if name else ():
        module = unwrapped(module._modules[part])  # type: ignore[arg-type]
    return module


def base_modules(model: nn.Module, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without the adapters' own modules: what the model had before any adapter.

    A wrapper is passed over, and its name is no part of a name: the names are those of the checkpoint, wherever
    torch.compile, checkpointing or data parallelism came between. A module that is shared comes once, under its first
    name, or under each with `every_name`.
    """
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if isinstance(module, Adapters) or (module in seen and not every_name):
            return
        seen.add(module)
        yield name, module
        for child_name, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{name}.{child_name}" if name else child_name)

    return walk(model, "")


def outside_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The model's modules, wrappers too, but nothing of its adapters; a shared one as often as it is there."""
    yield model
    for child in model._modules.values():
        if child is not None and not isinstance(child, Adapters):
            yield from outside_adapters(child)


def attach(host: nn.Module, kind: type[Adapters], adapter: Adapter, part: nn.Module) -> None:
    """Give a host one adapter's part, not yet active."""
    adapters = adapters_of(host)
    if adapters is None:
        adapters = kind(host)
        host.lora = adapters
    adapters._modules[adapter.name] = part
    adapters.training = host.training
    part.train(host.training)  # this one only: the rest follow the host already, and there may be many
    adapters.records = {**adapters.records, adapter.name: adapter}


def detach(host: nn.Module, name: str) -> None:
    """Take one adapter's part away, and the last traces with the last one."""
    adapters = adapters_of(host)
    assert adapters is not None and (adapters.undo is None or name not in adapters.active)
    activate(host, [n for n in adapters.active if n != name])
    adapters._modules.pop(name, None)
    adapters.records = {n: record for n, record in adapters.records.items() if n != name}
    if not adapters.records:
        take_layer(host, None)
        del host.lora


def activate(host: nn.Module, names: Iterable[str]) -> None:
    """Let these of the host's adapters act, and no others; names that it does not carry are passed over."""
    adapters: Any = adapters_of(host)
    adapters.active = tuple(n for n in names if n in adapters)
    adapters.terms = tuple(adapters[n] for n in adapters.active)
    refresh(host)


def refresh(host: nn.Module) -> None:
    """Set the host's class after a change of `active` or `undo`."""
    adapters: Any = adapters_of(host)
    adapters.acts(host)
    if adapters.undo is not None and adapters.undo.merged_class is not None:
        take_class(host, adapters.undo.merged_class)
    else:
        take_layer(host, adapters.layer if adapters.active and adapters.undo is None else adapters.resting_layer)


def original_class(host: nn.Module) -> type[nn.Module]:
    """The class that a host has in a model without adapters."""
    found = adapters_of(host)  # others may have made another class of that one since
    if found is not None:
        return found.original
    return host.original if isinstance(host, LoraLayer) else type(host)


def take_layer(host: nn.Module, layer: type[LoraLayer] | None) -> None:
    """Give a module the class that `layer` makes of its original class, or that one."""
    original = original_class(host)
    take_class(host, original if layer is None else acting_class(layer, original))


def take_class(host: nn.Module, new: type[nn.Module]) -> None:
    """Give a host another class. What others made of the present one meanwhile, they find made of the new one."""
    present, adapters = type(host), adapters_of(host)
    core = _ours(present, None if adapters is None else adapters.original) or present
    object.__setattr__(host, "__class__", _over(present, core, new))
    if adapters is not None:
        adapters.classes |= {present, type(host), new}
    if "_old_forward" in host.__dict__:  # accelerate's hooks keep the class's forward on the instance
        host._old_forward = MethodType(type(host).forward, host)  # type: ignore[assignment]
