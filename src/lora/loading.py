"""load: an adapter from disk, ours or PEFT's, checked by name and shape before memory is taken, whole or not at all."""

import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .atomic import alone, whole_or_not
from .bases import FrozenWeight
from .config import AdapterConfig, LoraConfig, check_name
from .errors import LoraError, LoraWarning
from .files.adapter import AdapterFile, reading
from .files.bounded import clip
from .files.fingerprint import REQUANTIZED, apart, difference, other_quantization, quantization
from .files.fit import check_fit, few, misfit
from .files.forms import form_of
from .files.header import CONFIG_FILE, PREFIX
from .files.settings import check_cost, meant
from .files.writing import repair
from .injection import fresh_parts, install, new_adapter
from .layers import Adapter, Part, base_modules, kind_of
from .layers.host import unwrapped
from .resident import unwrap
from .saving import BASE, is_finite, keys_of
from .targets import select, unseen
from .updates import update_named

Notes = list[str]


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
        config, extra = form_of(file.config).read(file.config, str(file.folder / CONFIG_FILE))
        adapter = new_adapter(root, name, config, extra)
        adapter.config, parts, notes = _filled(root, file, config, check)
        return file, adapter, parts, notes

    with alone():
        file, adapter, parts, notes = reading(Path(path), prepare)
        for note in notes:
            warnings.warn(f"{path}: {note}", LoraWarning, stacklevel=2)
        whole_or_not(root, lambda _: install(root, adapter, parts, trainable))
    repair(file)
    return model


def _filled(
    root: nn.Module, file: AdapterFile, config: AdapterConfig, check: bool
) -> tuple[AdapterConfig, list[Part], Notes]:
    """(the settings, the adapter's parts with the file's values, what the user should know)

    Names and shapes come first, from the header: memory is taken for what fits.
    """
    names = {module: name for name, module in base_modules(root)}
    targets: dict[str, nn.Module] = {}
    notes: Notes = []
    if isinstance(config, LoraConfig):
        targets, config, notes = _targets(root, file, config)
    elif config.matrices is not None:
        targets = select(root, config.matrices)
    parts = fresh_parts(root, targets, config, loading=True)
    copies = _check_shapes(root, file, _wanted(parts, names))
    tensors = file.tensors()
    if own := [key for key in copies if not _is_copy(copies[key], tensors[key])]:
        if not isinstance(config, LoraConfig):
            raise misfit(file, {"unexpected": own})
        config = _trained_too(root, file, config, own)
        notes.append(f"{few(own)} are not the base's, so they are taken for modules that were trained whole (train=)")
        parts = fresh_parts(root, targets, config, loading=True)
        _check_shapes(root, file, _wanted(parts, names))
    notes += dict.fromkeys(note for host, kind, part in parts if (note := kind.loads_as(host, part)))
    if unknown := [key for key in copies if copies[key].is_meta]:
        notes.append(
            f"{few(unknown)} are left out as copies of the base's, which is on the meta device and cannot be compared. "
            "If they were trained, load on a base that is in memory"
        )
    if wide := [key for key, tensor in tensors.items() if tensor.dtype == torch.float64]:
        notes.append(f"{len(wide)} of its tensors are float64 and are rounded: {few(wide)}")
    notes += _part_tied(parts, names, tensors)
    _fill(file, _wanted(parts, names), tensors, check)
    if check:
        weights = {names[host]: kind.weight(host) for host, kind, _ in parts}
        notes += check_origin(file, {name: weight for name, weight in weights.items() if weight is not None})
    return config, parts, notes


def _targets(root: nn.Module, file: AdapterFile, config: LoraConfig) -> tuple[dict[str, nn.Module], LoraConfig, Notes]:
    """The modules that the update is on, and the settings that say so in bounded time."""
    update_named(config.update)
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
    notes = [f"a pattern in {CONFIG_FILE} could take for ever to match; the tensors alone say what the targets are"]
    notes = [] if known is config else notes
    if dead := unseen(root, targets)[1]:
        notes.append(f"what the adapter has on {dead} never calls them, acts only once it is merged")
    _check_ranks(file, known, targets)
    return targets, known, notes


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


def _part_tied(parts: list[Part], names: dict[nn.Module, str], tensors: dict[str, Tensor]) -> Notes:
    """Untie those of the prepared tensors for which the file has different values: they were trained apart."""
    first: dict[int, str] = {}
    notes = []
    for host, kind, part in parts:
        for name, tensor in kind.tensors(part).items():
            key = f"{PREFIX}{names[host]}.{name}"
            other = first.setdefault(id(tensor), key) if key in tensors else key
            if other != key and not torch.equal(tensors[key], tensors[other]):
                kind.untie(part, name)
                notes.append(
                    f"{key} and {other} are tied in this model and were trained apart. The adapter keeps them apart; "
                    "to merge it, load it on a base in which they are untied"
                )
    return notes


def _fill(file: AdapterFile, wanted: dict[str, Tensor], tensors: dict[str, Tensor], check: bool) -> None:
    """Move the file's tensors into the prepared parts, each into its place."""
    wild = []
    for key in [key for key in wanted if key in tensors]:  # one that is not is tied to one that is
        target = wanted[key]
        target.data = tensors.pop(key).to(target.device, target.dtype)
        if check and not is_finite(target):
            wild.append(key)
    if wild:
        raise LoraError(
            f"{file.folder}: {len(wild)} of its tensors hold NaN or infinite values: {few(wild)}; training failed, or "
            "the file was damaged. If that is meant, lora.load(..., check=False)"
        )


def check_origin(file: AdapterFile, weights: dict[str, FrozenWeight]) -> list[str]:
    """Refuse a folder that was edited, or an adapter of another base; what else the user should know of the two."""
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
