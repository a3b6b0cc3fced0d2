"""PEFT's adapter_config.json and tensor names, to and from ours."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .config import LoraConfig, matches
from .errors import LoraError
from .layers.base import Adapter, base_modules
from .weights import is_conv1d

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
    known = {
        **{theirs: getattr(config, ours) for ours, theirs in _SAME.items()},
        "peft_type": "LORA",
        "task_type": _task_type(root),
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "target_modules": _target_modules(config, targets, modules),
        "modules_to_save": sorted(config.train) or None,
        "fan_in_fan_out": any(is_conv1d(modules[name]) for name in targets),
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "use_dora": False,
        "layers_pattern": None,
        "trainable_token_indices": None,
        "target_parameters": None,
    }
    if isinstance(known["target_modules"], str) or config.targets in (None, "all-linear"):
        known["layers_to_transform"] = None  # the names or the expression say which layers
    return dict(sorted({**known, **adapter.extra}.items()))


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
    fields = {ours: found[theirs] for ours, theirs in _SAME.items() if found.get(theirs) is not None}
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


def _target_modules(config: LoraConfig, targets: list[str], modules: dict[str, nn.Module]) -> str | list[str]:
    """What PEFT finds the same modules by: the user's own list or expression, or else the shortest list."""
    if isinstance(config.targets, list):
        return sorted(config.targets)
    if isinstance(config.targets, str) and config.targets != "all-linear" and config.layers is None:
        return config.targets
    leaves = sorted({name.rpartition(".")[2] for name in targets})
    found = [name for name in modules if matches(leaves, name) and not matches(config.exclude, name)]
    return leaves if sorted(found) == sorted(targets) else sorted(targets)
