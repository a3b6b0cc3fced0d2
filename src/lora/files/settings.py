"""PEFT's adapter_config.json, to and from our settings. Needs no torch and no model."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from ..config import SETTINGS, LoraConfig, matches
from ..errors import LoraError
from .bounded import clip, clip_lines
from .patterns import LONGEST, MOST, affordable, steps

_PEFT = {name: setting.peft for name, setting in SETTINGS.items()}
# The digest of every file covers the first settings, whatever they are; those that came later where they are set.
_FIRST = 8
_MOST_NAMES = {
    "target_modules": 100_000,
    "exclude_modules": 1_000,
    "modules_to_save": 500,
    "layers_to_transform": 10_000,
}
# Keys that only say how A and B started or where they came from: the tensors decide.
_HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")
# Keys that change what the tensors mean; any value but these is refused by name.
_MATHS: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None), "use_qalora": (False, None), "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []), "trainable_token_indices": (None, [], {}), "target_parameters": (None, []),
    "layer_replication": (None, []), "megatron_config": (None, {}), "arrow_config": (None, {}),
    "kasa_config": (None, {}), "velora_config": (None, {}), "monteclora_config": (None, {}),
}  # fmt: skip


def to_peft(
    config: LoraConfig, extra: dict[str, Any], *, modules: Sequence[str], targets: Sequence[str], fan_in_fan_out: bool,
    base_name: str | None, task_type: str | None,
) -> dict[str, Any]:  # fmt: skip
    """The contents of adapter_config.json.

    Args:
        extra: what `from_peft` kept of a loaded file.
        modules, targets: full names of all modules of the base, and of those that hold an update.
        fan_in_fan_out: whether any target stores its weight as (in, out).
        base_name, task_type: where the base comes from, and PEFT's word for what it does.
    """
    base_name = base_name or extra.get("base_model_name_or_path")
    known: dict[str, Any] = {
        **{theirs: getattr(config, ours) for ours, theirs in _PEFT.items()}, "peft_type": "LORA",
        "task_type": task_type, "base_model_name_or_path": base_name, "revision": None, "inference_mode": True,
        "modules_to_save": _modules_to_save(config, modules) or None, "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True, "layers_pattern": None,
        "trainable_token_indices": None, "target_parameters": None,
    }  # fmt: skip
    if config.update in ("lora", "dora"):  # PEFT has a key of its own for these
        del known[_PEFT["update"]]
    known["target_modules"], known["layers_to_transform"] = _target_modules(config, targets, modules)
    known["lora_alpha"] = _whole(known["lora_alpha"])
    known["alpha_pattern"] = {key: _whole(value) for key, value in config.alpha_pattern.items()}
    here = {"base_model_name_or_path": base_name} if base_name else {}
    return dict(sorted({**known, **extra, **here}.items()))


def config_digest(config: dict[str, Any]) -> str:
    """What of adapter_config.json gives the tensors their meaning; the two files of a save belong together by it."""
    covered = sorted((setting.maths, setting.peft) for setting in SETTINGS.values() if setting.maths)
    values = [config.get(key) for place, key in covered if place <= _FIRST]
    values += [[key, config[key]] for place, key in covered if place > _FIRST and config.get(key)]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _whole(number: float) -> float:
    """16.0 as 16: some engines read an integer there and nothing else."""
    return int(number) if float(number).is_integer() else number


def from_peft(found: dict[str, Any], where: str) -> tuple[LoraConfig, dict[str, Any]]:
    """(our config, the keys to keep as they are) from the contents of adapter_config.json.

    Raises:
        LoraError: a key that changes the maths and is not supported, a value out of range.
    """
    for key, neutral in _MATHS.items():
        if found.get(key) not in neutral:
            raise LoraError(
                f"{where}: {key} is {clip(repr(found[key]))}, which changes what the tensors mean and is not "
                "supported; merge that adapter with the tool that made it"
            )
    init = found.get("init_lora_weights", True)
    if init not in _HARMLESS_INIT:
        raise LoraError(
            f"{where}: init_lora_weights is {clip(repr(init))}: the tensors belong to a base weight changed at the "
            "start of training; convert the adapter to plain LoRA with the tool that made it"
        )
    # How A and B started is kept in the file's own words, of which we know fewer.
    ours = {*_PEFT.values(), "inference_mode", "fan_in_fan_out"} - {"init_lora_weights"}
    return config_of(found, where), {key: value for key, value in found.items() if key not in ours}


def config_of(found: dict[str, Any], where: str) -> LoraConfig:
    """Our config of an adapter_config.json, whether or not we can load what it means.

    Raises:
        LoraError: a value of the wrong type or out of range, a pattern or a list that is too long.
    """
    for key, most in _MOST_NAMES.items():
        if isinstance(found.get(key), list) and len(found[key]) > most:
            raise LoraError(f"{where}: {key} has {len(found[key]):,} entries; {most:,} are allowed")
    for key, longest in (("base_model_name_or_path", 4096), ("lora_update", 64)):
        text = found.get(key)
        if text is not None and not (isinstance(text, str) and len(text) <= longest):
            raise LoraError(f"{where}: {key} is {clip(repr(text))}; null or a text of at most {longest} characters")
    _check_patterns(found, where)
    fields: dict[str, Any] = {"r": 8, "alpha": 8}  # what PEFT takes where a file says nothing
    fields |= {ours: found[theirs] for ours, theirs in _PEFT.items() if found.get(theirs) not in (None, [])}
    fields["targets"] = found.get("target_modules") or None
    fields["init"] = "gaussian" if found.get("init_lora_weights") == "gaussian" else "kaiming"
    try:
        return LoraConfig(**fields)
    except LoraError as error:
        raise LoraError(f"{where}: {clip_lines(error)}") from None


def _check_patterns(found: dict[str, Any], where: str) -> None:
    given = {key: [found[key]] for key in ("target_modules", "exclude_modules") if isinstance(found.get(key), str)}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = found.get(key)
        given[key] = [rf"(.*\.)?({end})$" for end in patterns] if isinstance(patterns, dict) else []
    if (total := sum(len(pattern) for patterns in given.values() for pattern in patterns)) > MOST:
        raise LoraError(f"{where}: its patterns have {total:,} characters; {MOST:,} are allowed")
    for key, patterns in given.items():
        for pattern in patterns:
            try:
                if len(pattern) > LONGEST:
                    raise ValueError(f"longer than {LONGEST:,} characters")
                steps(pattern, 0)
            except ValueError as error:
                raise LoraError(f"{where}: {key}: got {clip(repr(pattern))}, {clip(error, 200)}") from None


def check_cost(config: LoraConfig, names: Sequence[str], where: str) -> None:
    """Raise LoraError where rank_pattern or alpha_pattern could take for ever to be matched with these modules."""
    for label, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if not affordable(list(patterns), names, ends=True):
            shown = clip(", ".join(patterns))
            raise LoraError(
                f"{where}: {label}: {shown!r} could take for ever to match; name the modules in it, without "
                "repetitions of repetitions"
            )


def meant(
    config: LoraConfig, names: Sequence[str], linear: Collection[str], held: Collection[str], named_lists: bool
) -> tuple[set[str], LoraConfig]:
    """Which modules of a base hold an update by a file, and the settings that say so in bounded time.

    The settings are compared with the tensors: a module that they name has to have some, and no other may. Where it is
    not known what they say, the tensors alone decide: no targets, a pattern that could take for ever to match (which
    leaves the settings), a layer's number beside numbers of other lists of modules, which PEFT counts otherwise.

    Args:
        names: of all modules that can hold one. linear: of those that "all-linear" means.
        held: of those of which the file has tensors.
        named_lists: whether the file says of which lists of modules the layers are (PEFT's layers_pattern).
    """
    slow = {
        label: isinstance(pattern, str) and not affordable([pattern], names)
        for label, pattern in (("targets", config.targets), ("exclude", config.exclude))
    }
    everything = config.targets == "all-linear"
    picks = selector(linear if everything else None if slow["targets"] else config.targets, full=everything)
    leaves_out = selector(None if slow["exclude"] else config.exclude)
    by_tensors = config.targets is None or slow["targets"]
    layers = None if config.layers is None else {config.layers} if isinstance(config.layers, int) else {*config.layers}

    def chosen(name: str) -> bool:
        if not (name in held if by_tensors else picks(name)) or leaves_out(name):
            return False
        if any(f".{entry}." in f".{name}." for entry in config.train):
            return False
        inside = {int(number) in layers for number in re.findall(r"\.(\d+)(?=\.)", f".{name}")} if layers else {True}
        return name in held if slow["exclude"] or len(inside) == 2 or (layers and named_lists) else inside == {True}

    found = {name for name in names if chosen(name)}
    return found, replace(config, targets=sorted(found), exclude=None) if any(slow.values()) and found else config


def selector(pattern: str | Collection[str] | None, full: bool = False) -> Callable[[str], bool]:
    """`config.matches` for many names. full: the names of a list have to be the whole."""
    if isinstance(pattern, str):
        compiled = re.compile(pattern)
        return lambda name: compiled.fullmatch(name) is not None
    ends = frozenset(pattern or ())
    if full:
        return lambda name: name in ends
    return lambda name: name in ends or any(name[i + 1 :] in ends for i, c in enumerate(name) if c == ".")


def task_type(root: object, trained: Collection[str]) -> str | None:
    """PEFT's word for what a model does, by its class. trained: the names of the modules that are trained whole.

    A classifier is called one where the head is in the file: PEFT then reads it from there, and fails without it.
    """
    name = type(root).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS" if {"classifier", "score"} & {each.rpartition(".")[2] for each in trained} else None
    return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") and hasattr(root, "get_encoder") else None


def _target_modules(
    config: LoraConfig, targets: Sequence[str], modules: Sequence[str]
) -> tuple[str | list[str], int | list[int] | None]:
    """(target_modules, layers_to_transform) that PEFT finds the same modules by.

    The user's own, or the last parts of the names, or the full names: the first of these that does.
    """
    own = config.targets if config.targets is not None and config.targets != "all-linear" else []
    leaves = sorted({name.rpartition(".")[2] for name in targets})
    for names in (sorted(own) if isinstance(own, list) else own, leaves):
        for layers in (config.layers, None):
            picks, leaves_out = selector(names), selector(config.exclude)
            found = [
                m for m in modules if m and picks(m) and not leaves_out(m) and _peft_keeps(names, layers, config, m)
            ]
            if found and sorted(found) == sorted(targets):
                return names, layers
    return sorted(targets), None


def _peft_keeps(names: str | list[str], layers: int | list[int] | None, config: LoraConfig, name: str) -> bool:
    """Whether PEFT leaves a module in that the names pick: a layer's number counts only behind two parts of a name."""
    if any(re.match(rf"(^|.*\.){re.escape(entry)}($|\..*)", name) for entry in config.train):
        return False
    if layers is None:
        return True
    if isinstance(names, str):  # PEFT takes no layers beside a regular expression
        return False
    index = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return index is not None and int(index.group(1)) in (layers if isinstance(layers, list) else [layers])


def _modules_to_save(config: LoraConfig, modules: Sequence[str]) -> list[str]:
    """The user's own names where PEFT, which compares the ends of names without a dot, finds the same modules."""
    meant = [name for name in modules if matches(config.train, name)]
    found = [name for name in modules if any(name.endswith(entry) for entry in config.train)]
    return sorted(config.train) if found == meant else sorted(meant)
