"""PEFT's adapter_config.json and tensor names, to and from ours."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..bases import weight_kind
from ..config import LoraConfig, matches
from ..errors import LoraError
from ..layers.host import Adapter, base_modules

# Ours -> PEFT's, where both say the same.
_SAME = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "bias": "bias",
    "rslora": "use_rslora",
    "exclude": "exclude_modules",
    "layers": "layers_to_transform",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
# Keys that only say how A and B started or where they came from: the tensors decide.
_HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")
# Keys that change what the tensors mean; any value but these is refused by name.
_MATHS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None, {}),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "velora_config": (None, {}),
    "monteclora_config": (None, {}),
}


def to_peft(root: nn.Module, adapter: Adapter, targets: Iterable[str]) -> dict[str, Any]:
    """The contents of adapter_config.json for an adapter on these target modules (full names)."""
    config, targets = adapter.config, list(targets)
    modules = dict(base_modules(root))
    base_name = getattr(root, "name_or_path", None) or adapter.extra.get("base_model_name_or_path")
    known: dict[str, Any] = {
        **{theirs: getattr(config, ours) for ours, theirs in _SAME.items()},
        "peft_type": "LORA",
        "task_type": _task_type(root),
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "modules_to_save": _modules_to_save(config, modules) or None,
        "fan_in_fan_out": any((kind := weight_kind(type(modules[n]))) and kind.transposed for n in targets),
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "use_dora": False,
        "layers_pattern": None,
        "trainable_token_indices": None,
        "target_parameters": None,
    }
    known["target_modules"], known["layers_to_transform"] = _target_modules(config, targets, modules)
    known["lora_alpha"] = _whole(known["lora_alpha"])
    known["alpha_pattern"] = {key: _whole(value) for key, value in config.alpha_pattern.items()}
    here = {"base_model_name_or_path": base_name} if base_name else {}
    return dict(sorted({**known, **adapter.extra, **here}.items()))


def _whole(number: float) -> float:
    """16.0 as 16: some engines read an integer there and nothing else."""
    return int(number) if float(number).is_integer() else number


def from_peft(found: dict[str, Any], where: str) -> tuple[LoraConfig, dict[str, Any]]:
    """(our config, the keys to keep as they are) from the contents of adapter_config.json.

    Raises:
        LoraError: another method than LoRA, a key that changes the maths and is not supported, a value out of range.
    """
    if found.get("peft_type") != "LORA":
        raise LoraError(f"{where}: peft_type is {found.get('peft_type')!r}; this library reads 'LORA'")
    for key, neutral in _MATHS.items():
        if found.get(key) not in neutral:
            raise LoraError(
                f"{where}: {key} is {found[key]!r}, which changes what the tensors mean and is not supported; "
                "merge that adapter with the tool that made it"
            )
    init = found.get("init_lora_weights", True)
    if init not in _HARMLESS_INIT:
        raise LoraError(
            f"{where}: init_lora_weights is {init!r}: the tensors belong to a base weight changed at the start of "
            "training; convert the adapter to plain LoRA with the tool that made it"
        )
    fields: dict[str, Any] = {"r": 8, "alpha": 8}  # what PEFT takes where a file says nothing
    fields |= {ours: found[theirs] for ours, theirs in _SAME.items() if found.get(theirs) is not None}
    if fields.get("exclude") == []:
        del fields["exclude"]
    if fields.get("layers") == []:
        del fields["layers"]
    try:
        config = LoraConfig(
            **fields,
            targets=found.get("target_modules") or None,
            train=found.get("modules_to_save") or [],
            init="gaussian" if init == "gaussian" else "kaiming",
        )
    except LoraError as error:
        raise LoraError(f"{where}: {error}") from None
    ours = {*_SAME.values(), "target_modules", "modules_to_save", "inference_mode", "fan_in_fan_out"}
    return config, {key: value for key, value in found.items() if key not in ours}


def _task_type(root: nn.Module) -> str | None:
    name = type(root).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") and hasattr(root, "get_encoder") else None


def _target_modules(
    config: LoraConfig, targets: list[str], modules: dict[str, nn.Module]
) -> tuple[str | list[str], int | list[int] | None]:
    """(target_modules, layers_to_transform) that PEFT finds the same modules by.

    The user's own, or the last parts of the names, or the full names: the first of these that does.
    """
    own = config.targets if config.targets is not None and config.targets != "all-linear" else []
    leaves = sorted({name.rpartition(".")[2] for name in targets})
    for names in (sorted(own) if isinstance(own, list) else own, leaves):
        for layers in (config.layers, None):
            found = [name for name in modules if name and _peft_selects(names, layers, config, name)]
            if found and sorted(found) == sorted(targets):
                return names, layers
    return sorted(targets), None


def _peft_selects(names: str | list[str], layers: int | list[int] | None, config: LoraConfig, name: str) -> bool:
    """Whether PEFT would pick a module: as we do, but a layer's number counts only behind two parts of the name."""
    if not names or not matches(names, name) or matches(config.exclude, name):
        return False
    if any(re.match(rf"(^|.*\.){re.escape(entry)}($|\..*)", name) for entry in config.train):
        return False
    if layers is None:
        return True
    if isinstance(names, str):  # PEFT takes no layers beside a regular expression
        return False
    index = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return index is not None and int(index.group(1)) in (layers if isinstance(layers, list) else [layers])


def _modules_to_save(config: LoraConfig, modules: dict[str, nn.Module]) -> list[str]:
    """The user's own names where PEFT, which compares the ends of names without a dot, finds the same modules."""
    meant = [name for name in modules if matches(config.train, name)]
    found = [name for name in modules if any(name.endswith(entry) for entry in config.train)]
    return sorted(config.train) if found == meant else sorted(meant)
