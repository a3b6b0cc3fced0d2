"""TRL's trainers over adapters: one base in memory, references without a second, checkpoints of the adapters alone."""

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import lora
from conftest import randomize
from lora.integrations import adapters_only, reference
from tiny_base import load_example_tokenizer, save_tiny_base
from trained_by_others import ADAPTER, losses, names, same_adapters

PAIRS = [("name: The Mill", " It is a pub.", " No."), ("food: Thai", " They cook Thai food.", " It is 7 o'clock.")] * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_example_tokenizer()


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What is counted below is what is alive, so that of other tests has to be gone."""
    gc.collect()
    yield
    gc.collect()


def policy(base: Path, **settings: Any) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    return lora.inject(model, **{"r": 2, "targets": ["q_proj", "v_proj"], **settings})


def preferences() -> Dataset:
    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS])


def arguments(kind: type, folder: Path, **changes: Any) -> Any:
    start: dict[str, Any] = {
        "max_steps": 2, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.01,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    return kind(str(folder), **{**start, **changes})


def bases_alive() -> int:
    """How many models of transformers there are, wherever they are kept."""
    return sum(isinstance(found, PreTrainedModel) and hasattr(found, "lm_head") for found in gc.get_objects())


def parameters(*models: nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for model in models for p in model.parameters()}.values())


def dpo(model: Any, tokenizer: Any, folder: Path, reference: str | None = None, **changes: Any) -> Any:
    return adapters_only(DPOTrainer)(
        model=model, args=arguments(DPOConfig, folder, **changes), train_dataset=preferences(),
        processing_class=tokenizer, reference=reference,
    )  # fmt: skip


def test_dpo_has_no_second_base_and_starts_at_ln_2(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    before = bases_alive()
    model = policy(base)
    trainer = dpo(model, tokenizer, tmp_path)
    assert bases_alive() - before == 1
    assert parameters(trainer.model, trainer.ref_model) == parameters(model)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses(trainer)[1] != losses(trainer)[0]
    assert names(tmp_path / "checkpoint-1") >= ADAPTER
    assert not [file for file in names(tmp_path / "checkpoint-1") if file.startswith("model")]


@pytest.mark.slow
def test_a_resumed_dpo_is_the_unbroken_one(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    first = dpo(policy(base), tokenizer, tmp_path / "first", max_steps=3)
    first.train()
    again = dpo(policy(base), tokenizer, tmp_path / "again", max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert losses(again) == losses(first)
    assert same_adapters(again.model, first.model)


def test_dpo_from_an_sft_adapter_has_that_adapter_as_its_reference(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    lora.save(randomize(policy(base)), tmp_path / "sft")
    model = AutoModelForCausalLM.from_pretrained(base)
    lora.load(model, tmp_path / "sft", name="sft")
    lora.load(model, tmp_path / "sft", trainable=True)
    trainer = dpo(model, tokenizer, tmp_path / "dpo", reference="sft")
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-7)
    frozen = lora.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "sft", name="sft")
    trained = dict(model.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in frozen.named_parameters())
    assert "sft" not in names(tmp_path / "dpo" / "checkpoint-2")  # it is on disk already
    with pytest.warns(lora.LoraWarning, match="reference: it is the base, and the model does not start there"):
        dpo(model, tokenizer, tmp_path / "other")


@pytest.mark.slow
def test_dpo_keeps_precomputed_answers_of_its_reference(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer = dpo(policy(base), tokenizer, tmp_path, precompute_ref_log_probs=True)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_the_plain_dpo_trainer_takes_the_reference_as_its_ref_model(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = policy(base)
    trainer = DPOTrainer(
        model=model, ref_model=reference(model), args=arguments(DPOConfig, tmp_path), train_dataset=preferences(),
        processing_class=tokenizer,
    )  # fmt: skip
    adapters_only(trainer).train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-7)
    assert names(tmp_path / "checkpoint-2") >= ADAPTER


def test_dropout_of_the_adapter_is_off_where_trl_says_so(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.warns(lora.LoraWarning, match="disable_dropout=True turns the dropout of 4 adapted modules off"):
        trainer = dpo(policy(base, dropout=0.5), tokenizer, tmp_path, max_steps=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-7)


def test_kto_has_no_second_base(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    before = bases_alive()
    data = Dataset.from_list(
        [{"prompt": p, "completion": c, "label": c == good} for p, good, bad in PAIRS for c in (good, bad)]
    )
    trainer = adapters_only(KTOTrainer)(
        model=policy(base), args=arguments(KTOConfig, tmp_path), train_dataset=data, processing_class=tokenizer,
    )  # fmt: skip
    assert bases_alive() - before == 1
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.5, abs=1e-6)  # 1 - sigmoid(0)
    assert names(tmp_path / "checkpoint-2") >= ADAPTER


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


@pytest.mark.parametrize(
    ("kind", "config"),
    [(GRPOTrainer, GRPOConfig), pytest.param(RLOOTrainer, RLOOConfig, marks=pytest.mark.slow)],
)
def test_grpo_and_rloo_have_no_second_base_for_their_kl(
    kind: type, config: type, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    before = bases_alive()
    args = arguments(
        config, tmp_path, beta=0.04, num_generations=2, max_completion_length=6, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = adapters_only(kind)(
        model=policy(base), args=args, reward_funcs=rewards, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt, _, _ in PAIRS]),
    )  # fmt: skip
    assert bases_alive() - before == 1
    assert trainer.beta == args.beta == 0.04
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-7)
    assert len(kl) == 2
    assert kl[1] != kl[0]
    assert names(tmp_path / "checkpoint-2") >= ADAPTER


def test_sft_saves_adapters_and_resumes(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    def made(folder: str) -> Any:
        data = Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in PAIRS])
        return adapters_only(SFTTrainer)(
            model=policy(base), args=arguments(SFTConfig, tmp_path / folder, max_steps=3), train_dataset=data,
            processing_class=tokenizer,
        )  # fmt: skip

    first, again = made("first"), made("again")
    first.train()
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert losses(again) == losses(first)
    assert names(tmp_path / "first" / "checkpoint-1") >= {*ADAPTER, "tokenizer.json", "optimizer.pt"}
    assert type(first).__name__ == "SFTTrainer"


def test_a_reward_models_head_is_in_its_checkpoint(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(2)
        made = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        return lora.inject(made, r=2, targets=["q_proj"], train=["score"])

    trainer = adapters_only(RewardTrainer)(
        model=model(), args=arguments(RewardConfig, tmp_path), train_dataset=preferences(), processing_class=tokenizer
    )
    trainer.train()
    config = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"]
    again = lora.load(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), tmp_path / "checkpoint-2")
    ids = tokenizer("name: The Mill", return_tensors="pt").input_ids
    assert torch.equal(again.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_peft_config_over_an_adapter_is_refused_by_any_trainer(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    data = Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in PAIRS])
    model = policy(base)
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    for kind, said in (
        (SFTTrainer, "PEFT would freeze it"),
        (adapters_only(SFTTrainer), "peft_config: the model carr"),
    ):
        with pytest.raises(lora.LoraError, match=said):
            kind(
                model=model, args=arguments(SFTConfig, tmp_path), train_dataset=data, processing_class=tokenizer,
                peft_config=LoraConfig(task_type="CAUSAL_LM"),
            )  # fmt: skip
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trains


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sfd", "reference: the model has no adapter 'sfd'; near names: sft"),
        ("default", "reference: adapter 'default' trains, so it would not stay where it is"),
    ],
)
def test_a_reference_that_is_none_is_refused(name: str, said: str, base: Path, tokenizer: Any, tmp_path: Path) -> None:
    lora.save(policy(base), tmp_path / "sft")
    model = lora.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "sft", name="sft")
    lora.inject(model, r=2, targets=["q_proj"])
    with pytest.raises(lora.LoraError, match=said):
        dpo(model, tokenizer, tmp_path, reference=name)


def test_what_trainers_cannot_have_is_refused(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = policy(base)
    with pytest.raises(lora.LoraError, match="args: sync_ref_model moves the reference"):
        dpo(model, tokenizer, tmp_path, sync_ref_model=True)
    data = Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in PAIRS])
    with pytest.raises(lora.LoraError, match="reference: got 'sft', and SFTTrainer has no reference model"):
        adapters_only(SFTTrainer)(
            model=model, args=arguments(SFTConfig, tmp_path), train_dataset=data, processing_class=tokenizer,
            reference="sft",
        )  # fmt: skip
    with pytest.raises(lora.LoraError, match="the model carries no adapter; lora.load it first"):
        dpo(AutoModelForCausalLM.from_pretrained(base), tokenizer, tmp_path, reference="sft")
