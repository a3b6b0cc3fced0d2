"""What docs/integrations.md tells people to type, typed: each block once, on tiny models, in the order of the page."""

import re
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import lora
from test_diffusers_unet import inputs, unet
from test_lightning_checkpoints import Task
from tiny_base import load_example_tokenizer, save_tiny_base
from trained_by_others import adapted, arguments, rows

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)
QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 2, "per_device_train_batch_size": 2}
PAIRS = [("name: The Mill", " It is a pub.", " No."), ("food: Thai", " They cook Thai food.", " It is 7.")] * 2


def typed(section: str, names: dict[str, Any], fresh: Any = None) -> dict[str, Any]:
    """Run a section's blocks, each with a new `model` where `fresh` makes one."""
    blocks = re.findall(r"```python\n(.*?)```", dict(BLOCKS)[section], re.S)
    assert blocks
    for i, block in enumerate(blocks):
        if fresh is not None:
            names["model"] = fresh(i)
        exec(compile(block, f"docs/integrations.md, {section}, block {i}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_base(tmp_path_factory.mktemp("base")))


def is_adapter(folder: str) -> bool:
    return (Path(folder) / "adapter_model.safetensors").is_file() and not list(Path(folder).glob("model*"))


def test_the_sections_are_all_here() -> None:
    assert [name for name, text in BLOCKS if "```python" in text] == [
        "transformers' Trainer", "TRL", "Weights for vLLM", "accelerate", "Lightning", "sentence-transformers",
        "diffusers",
    ]  # fmt: skip


def test_trainer(tmp_path: Path) -> None:
    names = {"lora": lora, "Trainer": Trainer, "args": arguments(tmp_path / "run"), "rows": rows()}
    typed("transformers' Trainer", names, lambda _: adapted())
    assert is_adapter("out/adapter") and is_adapter("run/checkpoint-4")


def test_trl(base: str, tmp_path: Path) -> None:
    def model(block: int) -> Any:
        made = AutoModelForCausalLM.from_pretrained(base)
        return made if block == 2 else lora.inject(made, r=2, targets=["q_proj", "v_proj"])

    dpo = {"beta": 0.1, "gradient_checkpointing": False, "bf16": False, "logging_steps": 1}
    names = typed(
        "TRL",
        {
            "lora": lora, "SFTTrainer": SFTTrainer, "DPOTrainer": DPOTrainer, "tokenizer": load_example_tokenizer(),
            "sft_args": SFTConfig("run", **QUIET, gradient_checkpointing=False, bf16=False),
            "dpo_args": DPOConfig("dpo", **QUIET, **dpo),
            "completions": Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in PAIRS]),
            "preferences": Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]),
        },
        model,
    )  # fmt: skip
    assert is_adapter("out/sft")
    assert names["trainer"].state.log_history[0]["loss"] == pytest.approx(0.6931472, abs=1e-7)


def test_weights_for_vllm() -> None:
    pushed: list[str] = []
    typed("Weights for vLLM", {"lora": lora, "push": lambda name, _: pushed.append(name)}, lambda _: adapted())
    assert not [name for name in pushed if ".lora." in name]


def test_accelerate() -> None:
    ids = torch.tensor([row["input_ids"] for row in rows(2)])
    batch = {"input_ids": ids, "labels": ids}
    typed("accelerate", {"lora": lora, "Accelerator": Accelerator, "torch": torch, "batch": batch}, lambda _: adapted())
    assert is_adapter("out/state/adapter_0")


def test_lightning(tmp_path: Path) -> None:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    data = [{key: torch.tensor(value) for key, value in row.items()} for row in rows(4)]
    batches: Any = torch.utils.data.DataLoader(data, batch_size=2)  # type: ignore[arg-type]
    names = {"lora": lora, "lightning": lightning, "module": Task(), "batches": batches}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        typed("Lightning", {**names, "quiet": {**quiet, "enable_checkpointing": False}})
    assert is_adapter("out/adapter")


def test_sentence_transformers(base: str) -> None:
    encoder = SentenceTransformer(base, device="cpu")
    names = typed(
        "sentence-transformers",
        {
            "lora": lora, "SentenceTransformerTrainer": SentenceTransformerTrainer, "encoder": encoder,
            "MultipleNegativesRankingLoss": MultipleNegativesRankingLoss,
            "encoder_args": SentenceTransformerTrainingArguments("run", **QUIET),
            "pairs": Dataset.from_list([{"anchor": a, "positive": b} for a, b, _ in PAIRS]),
        },
    )  # fmt: skip
    assert names["trainer"].state.global_step == 2
    assert is_adapter("out/adapter")


def test_diffusers() -> None:
    noisy = inputs()
    names: dict[str, Any] = {"lora": lora, "torch": torch, "unet": unet(), "noisy": noisy, "noise": noisy["sample"]}
    typed("diffusers", names)
    assert is_adapter("out/adapter")
    assert isinstance(names["unet"], nn.Module) and not list(lora.layers.hosts(names["unet"]))
