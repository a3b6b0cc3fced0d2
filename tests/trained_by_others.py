"""A tiny model and what trainers of other libraries leave of it on disk."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lora

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def wide_llama(seed: int = 0, vocabulary: int = 97) -> Any:
    """A Llama whose base is 20 times its adapter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocabulary, max_position_embeddings=64, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(r: int = 2, **settings: Any) -> Any:
    model = wide_llama()
    torch.manual_seed(1)
    return lora.inject(model, r=r, **{"targets": ["q_proj", "v_proj"], "dropout": 0.1, **settings})


def rows(count: int = 16) -> list[dict[str, list[int]]]:
    draw = torch.randint(1, 97, (count, 9), generator=torch.Generator().manual_seed(5)).tolist()
    return [{"input_ids": row, "labels": row} for row in draw]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    start: dict[str, Any] = {
        "max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.01,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**start, **changes})


def trainer(kind: type[Trainer], model: nn.Module, folder: Path, **changes: Any) -> Trainer:
    data = rows()
    return kind(model=model, args=arguments(folder, **changes), train_dataset=data, eval_dataset=data[:4])  # type: ignore[arg-type]


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def size(folder: Path, but: tuple[str, ...] = ()) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name not in but)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def steps(folder: Path) -> int:
    return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])


def same_adapters(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = dict(left.named_parameters()), dict(right.named_parameters())
    assert ours.keys() == theirs.keys()
    return all(torch.equal(p, theirs[name]) for name, p in ours.items())
