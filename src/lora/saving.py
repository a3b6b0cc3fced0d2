"""save and load: adapters on disk in PEFT's format, whole and verified or not at all."""

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from .activation import disabled
from .atomic import alone, steady, whole_or_not
from .bases import FrozenWeight
from .config import check_name
from .errors import LoraError, LoraWarning
from .files.adapter import AdapterFile, read, write
from .files.fingerprint import REQUANTIZED, apart, difference, fingerprint, other_quantization, quantization
from .files.header import CONFIG_FILE, PREFIX
from .files.settings import from_peft, task_type, to_peft
from .injection import fresh_parts, install, new_adapter
from .layers import Adapter, Kind, Part, base_modules, hosts
from .resident import is_merged, named, resident, unwrap
from .targets import select
from .updates import update_named

BASE = "lora.base"


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Write an adapter as `adapter_config.json` and `adapter_model.safetensors`, in PEFT's format, atomically.

    The header carries a checksum of the tensors and a fingerprint of the base. A merged model is unmerged for it
    and merged again.

    Args:
        path: a directory; made where missing.
        name: the adapter; None is the only one, or all: then "default" goes to `path`, others to `path/<name>`.

    Raises:
        LoraError: no such adapter, or tensors on the meta device.
    """
    root = unwrap(model)
    with steady():
        names = named(root, name, "to save; call lora.inject(model, ...) first")
        merged = is_merged(root)
        for each in names if not merged else ():
            alone = len(names) == 1 or each == "default"
            _save_one(root, Path(path) if alone else Path(path) / each, resident(root)[each])
    if merged:
        with disabled(root):
            save(root, path, name)


def load(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, check: bool = True,
    trainable: bool = False,
) -> nn.Module:  # fmt: skip
    """Read an adapter, ours or PEFT's, put it into the model in place and make it act alone.

    Every tensor of the file lands, every parameter of the adapter is filled, every shape fits, or nothing changes.

    Args:
        path: the directory that has the two files.
        name: what to call the adapter here.
        check: refuse an adapter that was trained on another base, or whose two files were not saved together
            (files by others carry no such record). Damaged tensors are always refused.
        trainable: whether A and B may be trained further.

    Returns:
        The same model.

    Raises:
        LoraError: what does not fit, by name; the model is as it was.
    """
    root = unwrap(model, changing=True)
    folder = Path(path)
    file = read(folder)
    config, extra = from_peft(file.config, str(folder / CONFIG_FILE))
    tensors = file.tensors()
    update_named(config.update)
    with alone():
        adapter = new_adapter(root, check_name(name), config, extra)
        targets = select(root, config, loading=True)
        if not targets:
            raise LoraError(
                f"{folder}: its target_modules {file.config.get('target_modules')!r} fit no module of "
                f"{type(root).__name__}; it was trained on {extra.get('base_model_name_or_path') or 'another model'}: "
                "load it on that"
            )
        parts = fresh_parts(root, targets, config, loading=True)
        _fill(root, folder, parts, tensors)
        if check:
            names = {module: name for name, module in base_modules(root)}
            weights = {names[host]: kind.weight(host) for host, kind, _ in parts}
            _check_origin(file, {name: weight for name, weight in weights.items() if weight is not None})
        whole_or_not(root, lambda _: install(root, adapter, parts, trainable))
    return model


def keys_of(kind: type[Kind], part: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter's part on the module `name`, by their keys in the file."""
    return {f"{PREFIX}{name}.{key}": tensor for key, tensor in kind.tensors(part).items()}


def _save_one(root: nn.Module, folder: Path, adapter: Adapter) -> None:
    tensors: dict[str, Tensor] = {}
    weights: dict[str, FrozenWeight] = {}
    for host_name, host, adapters in hosts(root):
        if adapter.name in adapters:
            tensors |= keys_of(type(adapters), adapters[adapter.name], host_name)
            weight = adapters.weight(host)
            if weight is not None:
                weights[host_name] = weight
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise LoraError(f"model: {key} is on the meta device and has no values to save")
        if hasattr(tensor, "full_tensor"):
            raise LoraError(
                f"model: {key} is sharded over several processes (FSDP2), of which each would write its own slice; "
                "gather the model with torch.distributed.checkpoint.state_dict and save it in one process"
            )
    config = to_peft(
        adapter.config, adapter.extra, modules=[name for name, _ in base_modules(root)],
        targets=[n for n, _, a in hosts(root) if a.by_targets and adapter.name in a],
        fan_in_fan_out=any(weight.transposed for weight in weights.values()),
        base_name=getattr(root, "name_or_path", None), task_type=task_type(root),
    )  # fmt: skip
    write(folder, config, tensors, {BASE: fingerprint(weights)})


def _fill(root: nn.Module, folder: Path, parts: list[Part], tensors: dict[str, Tensor]) -> None:
    """Copy the file's tensors into the prepared parts, each into its place and none left over."""
    names = {module: name for name, module in base_modules(root)}
    wanted: dict[str, Tensor] = {}
    for host, kind, part in parts:
        wanted |= keys_of(kind, part, names[host])
    extra = [key for key in tensors if key not in wanted and not _is_base_copy(root, key, tensors[key])]
    missing = [key for key in wanted if key not in tensors]
    wrong = [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(t.shape)}"
        for key, t in wanted.items()
        if key in tensors and tensors[key].shape != t.shape
    ]
    kinds = [k for k, t in wanted.items() if k in tensors and tensors[k].is_floating_point() != t.is_floating_point()]
    labels = {"of the adapter's tensors missing": missing, "unexpected": extra, "of another shape": wrong}
    labels["of another kind (integers or floating point)"] = kinds
    problems = [
        f"{len(found)} {label}: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}"
        for label, found in labels.items()
        if found
    ]
    if problems:
        raise LoraError(
            f"{folder}: its tensors do not fit this model with its {CONFIG_FILE}; {'; '.join(problems)}. Load it on "
            "the model that it was trained on, or copy it again if it is not whole"
        )
    for host, kind, part in parts:
        for key, target in keys_of(kind, part, names[host]).items():
            # A copy: what the file's reader gives may be a view of the file.
            target.data = tensors[key].to(target.device, target.dtype, copy=True)


def _is_base_copy(root: nn.Module, key: str, value: Tensor) -> bool:
    """Whether a tensor is a copy of the base's own: PEFT adds those of a targeted head or embedding to its files."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    module = dict(base_modules(root)).get(name.rpartition(".")[0])
    own = module._parameters.get(name.rpartition(".")[2]) if module is not None else None
    return own is not None and own.shape == value.shape and torch.equal(own.cpu(), value.to(own.dtype))


def _check_origin(file: AdapterFile, weights: dict[str, FrozenWeight]) -> None:
    folder, header = file.folder, file.metadata
    again = "if that is meant, lora.load(..., check=False)"
    if not file.paired:
        raise LoraError(
            f"{folder}: {CONFIG_FILE} is not the one saved with the tensors (edited, or half of another save); {again}"
        )
    notes = []
    if BASE in header and (why := difference(header[BASE], weights)) is not None:
        if quantization(weights) is None or apart(header[BASE], weights) > REQUANTIZED:
            raise LoraError(f"{folder}: this adapter was trained on another base: {why}; load it on that, or {again}")
        notes.append(
            f"{why}, each by little: its base was quantized from another dtype or on another device, or is a near "
            "relative of this one"
        )
    if BASE in header and (names := other_quantization(header[BASE], weights)) is not None:
        notes.append(
            f"this adapter was trained on a base in {names[0]}, and this one is in {names[1]}; it will act, but it was "
            "fitted to that base's rounding. Load the base as it was trained to have the same results"
        )
    for note in notes:
        warnings.warn(f"{folder}: {note}", LoraWarning, stacklevel=3)
