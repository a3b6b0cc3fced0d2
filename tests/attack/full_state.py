"""All that can be seen of a model, so that two of them, or one before and after, can be compared to the bit."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora
from lora.layers import hosts

State = dict[str, Any]
Run = Any
"""(model) -> Tensor, a forward on a fixed input"""


class Labels:
    """Names for the modules, parameters and hooks that a model had at a time, by which they are known again."""

    def __init__(self, model: nn.Module) -> None:
        self.known: dict[int, str] = {}
        self.kept: list[object] = []  # so that no id is used again
        for name, module in model.named_modules():
            self._add(module, f"module {name}")
            for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    self._add(tensor, f"tensor {name}.{own}")
            for place, (table, hook) in enumerate(_hooks(module)):
                self._add(hook, f"hook {name} {table} {place}")

    def _add(self, thing: object, label: str) -> None:
        if id(thing) not in self.known:
            self.known[id(thing)] = label
            self.kept.append(thing)

    def of(self, thing: object) -> str:
        return self.known.get(id(thing), "new")


def full_state(model: nn.Module, labels: Labels, run: Run, folder: Path | None = None) -> State:
    """By what is looked at: modules, tensors, attributes, hosts, hooks, the state dict, a forward pass, the summary,
    the files of `folder`. Of random numbers see `numbers`."""
    state: State = {}
    sharing: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        mro = tuple(c.__qualname__ for c in type(module).__mro__)
        shared = sharing.setdefault(id(module), name)
        state[f"class of {name}"] = (mro, labels.of(module), shared, module.training, list(module._modules))
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
            state[f"tensor {name}.{own}"] = None if tensor is None else (
                labels.of(tensor), sharing.setdefault(id(tensor), f"{name}.{own}"), type(tensor).__name__,
                tensor.requires_grad, digest(tensor), None if tensor.grad is None else digest(tensor.grad),
            )  # fmt: skip
        state[f"attributes of {name}"] = {k: _plain(v) for k, v in module.__dict__.items() if k not in _TOLD}
        state[f"hooks of {name}"] = [(table, labels.of(hook), type(hook).__name__) for table, hook in _hooks(module)]
    for name, host, adapters in hosts(model):
        state[f"host {name}"] = _host(model, host, adapters)
    state["state_dict"] = {key: digest(value) for key, value in model.state_dict().items()}
    state["forward"] = _forward(model, run)
    state["summary"] = _or_error(lambda: str(lora.summary(model)) if list(hosts(model)) else "")
    state["files"] = files(folder) if folder is not None else {}
    return state


_TOLD = {"_parameters", "_buffers", "_modules", "training"}
_TOLD |= {"active", "terms", "records", "undo", "group", "original", "resting_layer", "classes"}  # a host's, see below


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, str, bool, float, type(None))) else type(value).__qualname__


def _host(model: nn.Module, host: nn.Module, adapters: Any) -> tuple[Any, ...]:
    names = {module: name for name, module in model.named_modules()}
    group = getattr(adapters, "group", None)
    together = None if group is None else [names.get(member, "elsewhere") for member in group.members]
    records = [(n, r.config, r.anchor, sorted(r.trainable_before), r.extra) for n, r in adapters.records.items()]
    undo = None if adapters.undo is None else (type(adapters.undo).__name__, adapters.undo.into)
    resting = None if adapters.resting_layer is None else adapters.resting_layer.__name__
    terms = [names.get(term, "elsewhere") for term in adapters.terms]
    return (
        adapters.active,
        terms,
        records,
        undo,
        adapters.original.__qualname__,
        resting,
        together,
        [*adapters._modules],
    )


def _hooks(module: nn.Module) -> Iterable[tuple[str, Any]]:
    for table, found in module.__dict__.items():
        if "hooks" in table and isinstance(found, dict):
            yield from ((table, hook) for hook in found.values())


def digest(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_meta:
        return "meta", tuple(value.shape), str(value.dtype)
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=12).hexdigest(), tuple(value.shape), str(value.dtype)


def numbers() -> str:
    """The state of the random numbers."""
    return str(digest(torch.get_rng_state()))


def _forward(model: nn.Module, run: Run) -> Any:
    """As the model stands, in training or not; its random numbers are the same each time and are given back."""
    before = torch.get_rng_state()
    torch.manual_seed(5)
    try:
        with torch.no_grad():
            return _or_error(lambda: digest(run(model)))
    finally:
        torch.set_rng_state(before)


def _or_error(call: Callable[[], Any]) -> Any:
    """A model that is neither before nor after may not run at all."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def files(folder: Path) -> dict[str, str]:
    """What a folder has, by name; a lock that stays is none of it."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and "lock" not in path.name]
    return {str(path.relative_to(folder)): hashlib.blake2b(_contents(path)).hexdigest() for path in found}


def _contents(path: Path) -> bytes:
    """Of a whole safetensors file the header without its order, which safetensors draws anew each time, and without the
    checksum over that, and the data."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"].pop("lora.sha256", None)
    return json.dumps(header, sort_keys=True).encode() + data[8 + length :]


def difference(found: State, wanted: State) -> list[str]:
    """What of two states is not the same, by name."""
    return [key for key in dict.fromkeys([*wanted, *found]) if found.get(key, "absent") != wanted.get(key, "absent")]
