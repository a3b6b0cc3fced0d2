"""save and load: adapters on disk in PEFT's format, whole and verified or not at all."""

import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .activation import disabled
from .bases import FrozenWeight
from .config import LoraConfig, check_name
from .errors import LoraError, LoraWarning
from .files.adapter import AdapterFile, reading
from .files.bounded import clip
from .files.fingerprint import REQUANTIZED, apart, difference, fingerprint, other_quantization, quantization
from .files.fit import check_fit, few, misfit
from .files.header import CONFIG_FILE, PREFIX
from .files.settings import check_cost, from_peft, meant, task_type, to_peft
from .files.writing import repair, write
from .injection import fresh_parts, install, new_adapter
from .layers import Adapter, Kind, Part, base_modules, hosts, kind_of, part_tied
from .layers.host import unwrapped
from .resident import is_merged, named, refuse_sharded, resident, unwrap
from .targets import select
from .updates import update_named

BASE = "lora.base"
Notes = list[str]


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
    names = named(root, name, "to save; call lora.inject(model, ...) first")
    if is_merged(root):
        with disabled(root):
            return save(root, path, name, check=check)
    for each in names:
        alone = len(names) == 1 or each == "default"
        _save_one(root, Path(path) if alone else Path(path) / each, resident(root)[each], check)


def load(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, check: bool = True,
    trainable: bool = False,
) -> nn.Module:  # fmt: skip
    """Read an adapter, ours or PEFT's, put it into the model in place and make it act alone.

    Every tensor of the file lands, every parameter of the adapter is filled, every shape fits, or nothing changes.
    What is read is one state of the folder, also while somebody saves into it.

    Args:
        path: the directory that has the two files.
        name: what to call the adapter here.
        check: refuse an adapter that was trained on another base, whose two files were not saved together (files by
            others carry no such record), or that has parameters that are NaN or infinite. Damage is always refused.
        trainable: whether A and B may be trained further.

    Returns:
        The same model.

    Raises:
        LoraError: what does not fit, by name; the model is as it was.
    """
    root = unwrap(model, changing=True)
    check_name(name)

    def prepare(file: AdapterFile) -> tuple[AdapterFile, Adapter, list[Part], list[str]]:
        config, extra = from_peft(file.config, str(file.folder / CONFIG_FILE))
        update_named(config.update)
        adapter = new_adapter(root, name, config, extra)
        adapter.config, parts, notes = _filled(root, file, config, check)
        return file, adapter, parts, notes

    file, adapter, parts, notes = reading(Path(path), prepare)
    for note in notes:
        warnings.warn(f"{path}: {note}", LoraWarning, stacklevel=2)
    install(root, adapter, parts, trainable)
    repair(file)
    return model


def keys_of(kind: type[Kind], part: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter's part on the module `name`, by their keys in the file."""
    return {f"{PREFIX}{name}.{key}": tensor for key, tensor in kind.tensors(part).items()}


def _save_one(root: nn.Module, folder: Path, adapter: Adapter, check: bool) -> None:
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
    wild = [key for key, tensor in tensors.items() if check and not _finite(tensor)]
    if wild:
        raise LoraError(
            f"model: adapter {adapter.name!r} has values that are NaN or infinite: {few(wild)}; training has failed. "
            "If they are meant to be kept, lora.save(..., check=False)"
        )
    config = to_peft(
        adapter.config, adapter.extra, modules=[name for name, _ in base_modules(root)],
        targets=[n for n, _, a in hosts(root) if a.by_targets and adapter.name in a],
        fan_in_fan_out=any(weight.transposed for weight in weights.values()),
        base_name=getattr(root, "name_or_path", None), task_type=task_type(root),
    )  # fmt: skip
    write(folder, config, tensors, {BASE: fingerprint(weights)})


def _finite(tensor: Tensor) -> bool:
    """Whether a parameter has no NaN and no infinity; a buffer may have them (a mask of an attention has)."""
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(end.item()) for end in torch.aminmax(tensor.detach()))


def _filled(
    root: nn.Module, file: AdapterFile, config: LoraConfig, check: bool
) -> tuple[LoraConfig, list[Part], Notes]:
    """(the settings, the adapter's parts with the file's values, what the user should know)

    Names and shapes come first, from the header: memory is taken for what fits.
    """
    names = {module: name for name, module in base_modules(root)}
    targets, config, notes = _targets(root, file, config)
    _check_ranks(file, config, targets)
    parts = fresh_parts(root, targets, config, loading=True)
    copies = _check_shapes(root, file, _wanted(parts, names))
    tensors = file.tensors()
    if own := [key for key in copies if not _is_copy(copies[key], tensors[key])]:
        config = _trained_too(root, file, config, own)
        notes.append(f"{few(own)} are not the base's, so they are taken for modules that were trained whole (train=)")
        parts = fresh_parts(root, targets, config, loading=True)
        _check_shapes(root, file, _wanted(parts, names))
    if wide := [key for key, tensor in tensors.items() if tensor.dtype == torch.float64]:
        notes.append(f"{len(wide)} of its tensors are float64 and are rounded: {few(wide)}")
    for one, other in part_tied(parts, lambda part, name: f"{PREFIX}{names[part.host]}.{name}", tensors):
        notes.append(
            f"{one} and {other} are tied in this model and were trained apart. The adapter keeps them apart; to merge "
            "it, load it on a base in which they are untied"
        )
    _fill(file, _wanted(parts, names), tensors, check)
    if check:
        weights = {names[host]: kind.weight(host) for host, kind, _ in parts}
        notes += _check_origin(file, {name: weight for name, weight in weights.items() if weight is not None})
    return config, parts, notes


def _targets(root: nn.Module, file: AdapterFile, config: LoraConfig) -> tuple[dict[str, nn.Module], LoraConfig, Notes]:
    known = config

    def choose(names: list[str], linear: list[str]) -> set[str]:
        nonlocal known
        found, known = meant(config, names, linear, file.modules, bool(file.config.get("layers_pattern")))
        return found

    targets = select(root, config, choose)
    if not targets:
        base = file.config.get("base_model_name_or_path") or "another model"
        raise LoraError(
            f"{file.folder}: its target_modules {clip(repr(file.config.get('target_modules')), 200)} fit no module of "
            f"{type(root).__name__}; it was trained on {clip(base, 200)}: load it on that"
        )
    check_cost(config, list(targets), str(file.folder / CONFIG_FILE))
    slow = [f"a pattern in {CONFIG_FILE} could take for ever to match; the tensors alone say what the targets are"]
    return targets, known, [] if known is config else slow


def _check_ranks(file: AdapterFile, config: LoraConfig, targets: dict[str, nn.Module]) -> None:
    """Refuse a rank for which the file has no A, before memory is taken for it."""
    held, anywhere = file.modules, {length for entry in file.entries.values() for length in entry.shape}
    wrong = []
    for name, module in targets.items():
        rank, kind = config.rank(name), kind_of(module)
        weight = kind.weight(module) if kind else None
        for key in held.get(name, []):
            shape = file.entries[key].shape
            wanted = (rank, weight.shape[1] if weight else 1)
            if key.endswith(("_A", "_A.weight")) and (rank not in shape or file.entries[key].size < math.prod(wanted)):
                wrong.append(f"{key} is {shape}, expected {wanted}")
        if rank not in anywhere:
            wrong.append(f"no tensor has the rank of {name}, {rank}")
    if wrong:
        raise misfit(file, {"of another shape": wrong})


def _wanted(parts: list[Part], names: dict[nn.Module, str]) -> dict[str, Tensor]:
    return {key: tensor for host, kind, part in parts for key, tensor in keys_of(kind, part, names[host]).items()}


def _check_shapes(root: nn.Module, file: AdapterFile, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compare the file's header with what the adapter needs, by name and both ways.

    Returns:
        The base's own parameters of which the file has something: PEFT adds those of an embedding or a head.
    """
    entries, modules, ends = file.entries, dict(base_modules(root)), _ends(root).values()
    copies: dict[str, Tensor] = {}
    for key in entries.keys() - wanted.keys():
        owner, _, leaf = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
        own = modules[owner]._parameters.get(leaf) if owner in modules else None
        rows, shape = entries[key].shape[:1], () if own is None else tuple(own.shape)
        if own is not None and modules[owner] in ends and rows != shape[:1]:
            raise LoraError(
                f"{file.folder}: its {clip(key, 200)} has {rows[0] if rows else 'no'} rows, and the model's has "
                f"{shape[0]}: the vocabulary was resized before training. "
                f"model.resize_token_embeddings({rows[0] if rows else ''}) first, then lora.load"
            )
        if own is not None and entries[key].shape == shape:
            copies[key] = own
    check_fit(file, wanted, copies)
    return copies


def _is_copy(own: Tensor, value: Tensor) -> bool:
    return own.is_meta or torch.equal(own.cpu(), value.to(own.dtype))


def _ends(root: nn.Module) -> dict[str, nn.Module]:
    """The embedding and the head, where transformers names them."""
    ends = [getattr(root, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    inner = [unwrapped(module) for module in ends if module is not None]
    return {name: module for name, module in base_modules(root) if module in inner}


def _trained_too(root: nn.Module, file: AdapterFile, config: LoraConfig, keys: list[str]) -> LoraConfig:
    """The settings with the embedding and the head trained whole, of which the file has values of its own."""
    ends, whole = _ends(root), [key.removeprefix(PREFIX).rpartition(".")[0] for key in keys]
    if not ends.keys() >= set(whole):
        raise misfit(file, {"unexpected": keys})
    weights = [ends[name].weight for name in whole]
    return replace(config, train=[*config.train, *(n for n, m in ends.items() if any(m.weight is w for w in weights))])


def _fill(file: AdapterFile, wanted: dict[str, Tensor], tensors: dict[str, Tensor], check: bool) -> None:
    """Move the file's tensors into the prepared parts, each into its place."""
    wild = []
    for key in [key for key in wanted if key in tensors]:  # one that is not is tied to one that is
        target = wanted[key]
        target.data = tensors.pop(key).to(target.device, target.dtype)
        if check and not _finite(target):
            wild.append(key)
    if wild:
        raise LoraError(
            f"{file.folder}: {len(wild)} of its tensors hold NaN or infinite values: {few(wild)}; training failed, or "
            "the file was damaged. If that is meant, lora.load(..., check=False)"
        )


def _check_origin(file: AdapterFile, weights: dict[str, FrozenWeight]) -> list[str]:
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
    return notes
