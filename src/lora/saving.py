"""save: an adapter to disk in PEFT's format, whole or not at all."""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .activation import disabled
from .atomic import steady
from .bases import FrozenWeight
from .config import LoraConfig, PromptConfig
from .errors import LoraError
from .files import prompts
from .files.fingerprint import fingerprint
from .files.fit import few
from .files.header import LABELS, PREFIX
from .files.settings import task_type, to_peft
from .files.writing import write
from .layers import Adapter, Kind, base_modules, hosts
from .resident import is_merged, named, refuse_sharded, resident, unwrap

BASE = "lora.base"


def save(
    model: nn.Module, path: str | os.PathLike[str], name: str | None = None, *, check: bool = True
) -> None:  # fmt: skip
    """Write an adapter as `adapter_config.json` and `adapter_model.safetensors`, in PEFT's format, atomically.

    The header carries the settings, a checksum and a fingerprint of the base. Whatever ends a save, `load` finds the
    old adapter or the new one, whole. A merged model is unmerged for it and merged again.

    Args:
        path: a directory; made where missing.
        name: the adapter; None is the only one, or all: then "default" goes to `path`, others to `path/<name>`.
        check: refuse parameters that are NaN or infinite.

    Raises:
        LoraError: no such adapter, tensors on the meta device or not finite, or a folder that cannot be written to (no
            room, no permission); what was there is as it was.
    """
    root = unwrap(model)
    refuse_sharded(model)
    with steady():
        names = named(root, name, "to save; call lora.inject(model, ...) first")
        merged = is_merged(root)
        for each in names if not merged else ():
            alone = len(names) == 1 or each == "default"
            _save_one(root, Path(path) if alone else Path(path) / each, resident(root)[each], check)
    if merged:
        with disabled(root):
            save(root, path, name, check=check)


class Contents(NamedTuple):
    """What a folder holds of one adapter: the settings in PEFT's words, the tensors by their keys, and the frozen
    weights that they belong to, by full name."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: dict[str, FrozenWeight]


def contents(root: nn.Module, adapter: Adapter) -> Contents:
    """What a save of the adapter writes; the tensors are the adapter's own, no copies."""
    tensors: dict[str, Tensor] = {}
    weights: dict[str, FrozenWeight] = {}
    for host_name, host, adapters in hosts(root):
        if adapter.name in adapters:
            tensors |= keys_of(type(adapters), adapters[adapter.name], host_name)
            weight = adapters.weight(host)
            if weight is not None:
                weights[host_name] = weight
    named, task = getattr(root, "name_or_path", None), task_type(root, adapter.config.train)
    if isinstance(adapter.config, PromptConfig):
        config = prompts.to_peft(adapter.config, adapter.extra, keys=tensors, base_name=named, task_type=task)
        return Contents(config, tensors, weights)
    assert isinstance(adapter.config, LoraConfig)
    config = to_peft(
        adapter.config, adapter.extra, modules=[name for name, _ in base_modules(root)],
        targets=[n for n, _, a in hosts(root) if a.by_targets and adapter.name in a],
        fan_in_fan_out=any(weight.transposed for weight in weights.values()), base_name=named, task_type=task,
    )  # fmt: skip
    return Contents(config, tensors, weights)


def _save_one(root: nn.Module, folder: Path, adapter: Adapter, check: bool) -> None:
    config, tensors, weights = contents(root, adapter)
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise LoraError(f"model: {key} is on the meta device and has no values to save")
        if hasattr(tensor, "full_tensor"):
            raise LoraError(
                f"model: {key} is sharded over several processes (FSDP2), of which each would write its own slice; "
                "gather the model with torch.distributed.checkpoint.state_dict and save it in one process"
            )
    wild = [key for key, tensor in tensors.items() if check and not is_finite(tensor)]
    if wild:
        raise LoraError(
            f"model: adapter {adapter.name!r} has values that are NaN or infinite: {few(wild)}; training has failed. "
            "If they are meant to be kept, lora.save(..., check=False)"
        )
    write(folder, config, tensors, {BASE: fingerprint(weights), **_labels(root)})


def _labels(root: nn.Module) -> dict[str, str]:
    """What a classifier calls its outputs, for the header: neither PEFT's settings nor the base have a place for it."""
    config = getattr(root, "config", None)
    names = getattr(config, "id2label", None) if type(root).__name__.endswith("ForSequenceClassification") else None
    if not isinstance(names, dict) or all(str(name).startswith("LABEL_") for name in names.values()):
        return {}  # the names that transformers gives those that have none
    return {LABELS: json.dumps([str(names[number]) for number in sorted(names)])}


def keys_of(kind: type[Kind], part: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter's part on the module `name`, by their keys in the file."""
    return {f"{PREFIX}{name}.{key}": tensor for key, tensor in kind.tensors(part).items()}


def is_finite(tensor: Tensor) -> bool:
    """Whether a parameter has no NaN and no infinity; a buffer may have them (a mask of an attention has)."""
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(end.item()) for end in torch.aminmax(tensor.detach()))
