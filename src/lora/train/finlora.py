"""FinLoRA's runs: an entry of its `finetune_configs.json` as a recipe.

An entry has the names below and says what differs from run to run. The rest, which its training script fixes, is here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LoraError, near
from .names import understood

# What an entry may say; `names` tells what each means.
KEYS = (
    "base_model", "dataset_path", "lora_r", "quant_bits", "learning_rate", "num_epochs", "batch_size",
    "gradient_accumulation_steps", "lora_alpha", "peft_use_dora", "peft_use_rslora",
)  # fmt: skip
FIXED: dict[str, Any] = {
    "targets": ["q_proj", "k_proj", "v_proj"], "alpha": 16, "dropout": 0.05, "template": "inst", "eval_share": 0.02,
    "max_length": 4096, "schedule": "cosine", "warmup_steps": 10,
}  # fmt: skip


def is_entry(entry: Mapping[str, Any]) -> bool:
    """Whether a mapping is a run as FinLoRA writes it."""
    return "base_model" in entry and "dataset_path" in entry


def fields_of(name: str, entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The entry in a recipe's words, with what is fixed beside it.

    Args:
        name: the entry's, after which the adapter's folder is called where nothing else is said.
        folder: where its file lies, from which its `dataset_path` leads.
    """
    unknown = [key for key in entry if key not in KEYS]
    if unknown:
        told = [f"unknown key {key[:80]!r}{near(key[:80], KEYS)}" for key in unknown[:20]]
        raise LoraError("\n  - ".join([f"{name}: not as FinLoRA writes its runs", *told]))
    for key, value in entry.items():
        if isinstance(value, (list, dict)) or value is None:
            raise LoraError(f"{name}: {key} is {value!r:.80}; it must be one word or number")
    fixed = {key: value for key, value in FIXED.items() if key != "alpha" or entry.get("lora_alpha") is None}
    path = dataset(str(entry["dataset_path"]), folder)
    said = {**entry, "dataset_path": str(path)}
    return {**fixed, **understood(said, ["batch_size"])[0], "out": f"lora_adapters/{name}"}


def dataset(path: str, folder: Path) -> Path:
    """Where an entry's rows lie. Its path leads from the folder of its script, `lora/`, and people run it elsewhere.

    The first that is there: the path from `folder`, then its last parts (data/train/x.jsonl, train/x.jsonl, x.jsonl)
    below `folder`. Where none is, the first, which the check of the data then names.
    """
    parts = [part for part in Path(path).parts if part not in ("..", ".", "/")]
    tails = [folder.joinpath(*parts[start:]) for start in range(len(parts))]
    first, *others = [folder / path, *tails]
    try:
        return next((place for place in (first, *others) if place.is_file()), first)
    except (OSError, ValueError):  # longer than a path may be, or a NUL in it
        return first
