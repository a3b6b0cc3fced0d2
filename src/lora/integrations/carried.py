"""What a model that others train carries: its adapters, and whatever else of it trains."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..activation import disabled
from ..errors import LoraError, LoraWarning
from ..files.adapter import AdapterFile, reading
from ..files.fit import check_fit, few
from ..files.forms import form_of
from ..files.header import CONFIG_FILE
from ..layers import Adapter, hosts
from ..layers.copies import base_parameters
from ..layers.host import submodule
from ..loading import check_origin
from ..resident import acting, is_merged, resident
from ..saving import contents, save


def carries(model: Any) -> bool:
    """Whether anything in a model is adapted."""
    return isinstance(model, nn.Module) and any(True for _ in hosts(model))


def trained_adapters(model: nn.Module) -> list[str]:
    """The adapters that train; where none does, those that act."""
    found = {
        name: True
        for _, _, adapters in hosts(model)
        for name in adapters.records
        if any(parameter.requires_grad for parameter in adapters.trained(adapters[name]))
    }
    return list(found) or acting(model) or list(resident(model))


def home(model: nn.Module, name: str) -> nn.Module:
    """The module that an adapter was given to: the model, or one inside it, whose names are those of the files."""
    for host_name, _, adapters in hosts(model):
        if name in adapters.records:
            anchor = adapters.records[name].anchor
            if not f".{host_name}".endswith(f".{anchor}"):
                raise LoraError(
                    f"model: adapter {name!r} was given to a module that this one is a part of; hand over that one"
                )
            return submodule(model, host_name[: len(host_name) - len(anchor)].rstrip("."))
    raise LoraError(f"model: it carries no adapter {name!r}")


def check_nothing_else_trains(model: nn.Module) -> None:
    """Refuse what a checkpoint of adapters alone would lose."""
    if others := [name for name, parameter in base_parameters(model) if parameter.requires_grad]:
        raise LoraError(
            f"model: {len(others)} parameters outside its adapters train and would be in no checkpoint: {few(others)}; "
            "name their modules in lora.inject(model, train=[...]), or freeze them"
        )


def save_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write what trains, each adapter as `lora.save` does; of several, those that are not "default" go to a folder of
    their name."""
    check_nothing_else_trains(model)
    for name, place in _places(model, folder).items():
        save(home(model, name), place, name)


def load_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Fill the adapters that train with what `save_adapters` wrote, to the bit: the parameters stay the same objects,
    so that an optimizer goes on with them. All of it fits, or nothing changes.

    Raises:
        LoraError: files of other settings, of another base, damaged, or not there.
    """
    if is_merged(model):
        with disabled(model):
            return load_adapters(model, folder)
    found = [pair for name, place in _places(model, folder).items() for pair in _read(model, name, place)]
    with torch.no_grad():
        for tensor, values in found:
            tensor.copy_(values)


def has_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a file for each adapter that trains."""
    return all((place / CONFIG_FILE).is_file() for place in _places(model, folder).values())


def _places(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, Path]:
    names, path = trained_adapters(model), Path(folder)
    return {name: path if len(names) == 1 or name == "default" else path / name for name in names}


def _read(model: nn.Module, name: str, place: Path) -> list[tuple[Tensor, Tensor]]:
    """(the adapter's own tensor, the file's values) for each tensor of it."""
    root = home(model, name)
    adapter: Adapter = resident(root)[name]

    def values(file: AdapterFile) -> list[tuple[Tensor, Tensor]]:
        config, tensors, weights = contents(root, adapter)
        form = form_of(config)
        if form.digest(file.config) != form.digest(config):
            keys = {"peft_type", *form.maths}
            other = sorted(key for key in keys if file.config.get(key) != config.get(key))
            told = "; ".join(f"{key} is {file.config.get(key)!r} there and {config.get(key)!r} here" for key in other)
            raise LoraError(f"{place}: it was saved with other settings: {told}; inject the adapter as it was")
        check_fit(file, tensors, ())
        for note in check_origin(file, weights):
            warnings.warn(f"{place}: {note}", LoraWarning, stacklevel=2)
        read = file.tensors()
        pairs = [(tensor, read[key]) for key, tensor in tensors.items() if key in read]
        if rounded := sorted({f"{v.dtype} there, {t.dtype} here" for t, v in pairs if v.dtype != t.dtype}):
            warnings.warn(
                f"{place}: adapter {name!r} is in another dtype ({', '.join(rounded)}), so what is restored may not be "
                "what was saved to the bit",
                LoraWarning,
                stacklevel=2,
            )
        return pairs

    return reading(place, values)
