"""PEFT's adapter_config.json of an adaption prompt (LLaMA-Adapter), to and from our settings."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from ..config import PromptConfig
from ..errors import LoraError
from .bounded import clip, clip_lines
from .header import PREFIX

PROMPT, GATE = ".adaption_prompt", ".adaption_gate"
# Our fields by their keys. PEFT has no word for a gate of each head, and its own gate is one for each layer.
KEYS = {
    "layers": "adapter_layers", "prompt_length": "adapter_len", "gate": "lora_gate", "train": "modules_to_save",
    "features": "lora_features", "fusion": "lora_fusion", "train_bias": "lora_train_bias",
}  # fmt: skip
_ABSENT: dict[str, Any] = {
    "gate": "layer",
    "train": [],
    "features": None,
    "fusion": "late",
    "train_bias": False,
}  # what a file means that has no such key
_MOST_FEATURES = 10_000_000
_MOST = {"adapter_layers": 10_000, "adapter_len": 1_000_000}


def to_peft(
    config: PromptConfig, extra: dict[str, Any], *, keys: Iterable[str], base_name: str | None, task_type: str | None
) -> dict[str, Any]:
    """The contents of adapter_config.json; `keys`: of the tensors, which name the attentions."""
    owners = {key.removeprefix(PREFIX).removesuffix(PROMPT).rpartition(".")[2] for key in keys if key.endswith(PROMPT)}
    base_name = base_name or extra.get("base_model_name_or_path")
    known: dict[str, Any] = {
        **{theirs: getattr(config, ours) for ours, theirs in KEYS.items()}, "peft_type": "ADAPTION_PROMPT",
        "task_type": task_type, "base_model_name_or_path": base_name, "revision": None, "inference_mode": True,
        "target_modules": "|".join(sorted(owners)),
    }  # fmt: skip
    for ours, absent in _ABSENT.items():  # a file of PEFT's own form stays one
        if known[KEYS[ours]] == absent:
            del known[KEYS[ours]]
    here = {"base_model_name_or_path": base_name} if base_name else {}
    return dict(sorted({**known, **extra, **here}.items()))


def from_peft(found: dict[str, Any], where: str) -> tuple[PromptConfig, dict[str, Any]]:
    """(our config, the keys to keep as they are) from the contents of adapter_config.json."""
    ours = {*KEYS.values(), "inference_mode", "peft_type", "task_type", "revision", "target_modules"}
    return config_of(found, where), {key: value for key, value in found.items() if key not in ours}


def config_of(found: dict[str, Any], where: str) -> PromptConfig:
    """Our config of an adapter_config.json.

    Raises:
        LoraError: a value that is missing, of the wrong type or out of range.
    """
    for key, most in _MOST.items():
        value = found.get(key)
        if type(value) is not int or not 1 <= value <= most:
            raise LoraError(f"{where}: {key} is {clip(repr(value))}; a whole number from 1 to {most:,}")
    text = found.get("base_model_name_or_path")
    if text is not None and not (isinstance(text, str) and len(text) <= 4096):
        raise LoraError(f"{where}: base_model_name_or_path is {clip(repr(text))}; null or a text")
    train = found.get("modules_to_save", [])
    if not isinstance(train, list) or len(train) > 500:
        raise LoraError(f"{where}: modules_to_save is {clip(repr(train))}; a list of at most 500 names")
    features = found.get(KEYS["features"])
    if features is not None and not _are_sizes(features):
        raise LoraError(
            f"{where}: {KEYS['features']} is {clip(repr(features))}; [tokens, dim], {_MOST_FEATURES:,} in all"
        )
    try:
        fields: dict[str, Any] = {ours: found.get(theirs, _ABSENT.get(ours)) for ours, theirs in KEYS.items()}
        return PromptConfig(**fields)
    except LoraError as error:
        raise LoraError(f"{where}: {clip_lines(error)}") from None


def _are_sizes(found: Any) -> bool:
    whole = isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found)
    return whole and found[0] * found[1] <= _MOST_FEATURES


def config_digest(config: dict[str, Any]) -> str:
    """What of adapter_config.json gives the tensors their meaning; the two files of a save belong together by it."""
    absent = {KEYS[ours]: value for ours, value in _ABSENT.items()}
    held = {key: config.get(key) for key in sorted(KEYS.values())}
    later = {KEYS[ours] for ours in ("features", "fusion", "train_bias")}  # settings that older files know nothing of
    values = ["ADAPTION_PROMPT", *([k, v] for k, v in held.items() if k not in later or v not in (None, absent[k]))]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def words(found: dict[str, Any], where: str) -> str:
    """The settings for a reader."""
    config = config_of(found, where)
    gate = "a gate for each head" if config.gate == "head" else "one gate for each layer, as PEFT has it"
    whole = f", trained whole: {clip(', '.join(config.train), 300)}" if config.train else ""
    reads = ""
    if config.features is not None:
        where = "to the prompts" if config.fusion == "late" else "in the layers below"
        reads = f", {config.features[0]} x {config.features[1]} features of each row added {where}"
    more = f"{reads}{', a scale and a bias for each linear' if config.train_bias else ''}{whole}"
    return f"LLaMA-Adapter, {config.prompt_length} prompts in the top {config.layers} layers, {gate}{more}"
