"""Checkpoints that transformers writes of a model in which copies are tied to each other, or share with the base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lora
from conftest import randomize, same_bits, snapshot, tiny_bert, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained")  # what it leaves is what is looked at here
ENDS = {"llama": ["embed_tokens", "lm_head"], "gpt2": ["wte", "lm_head"]}
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
BUILD = {"llama": lambda: tiny_llama(tie_word_embeddings=True), "gpt2": tiny_gpt2}


def adapted(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(1)
    return lora.inject(BUILD[kind](), r=4, targets=TARGETS[kind], **({"train": ENDS[kind]} | settings))


def trainer(model: nn.Module, folder: Path, steps: int) -> Trainer:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, learning_rate=0.05, report_to=[], use_cpu=True, disable_tqdm=True
    )
    return Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(BUILD))
def test_trainer_checkpoint_of_tied_whole_modules_is_saved_and_resumed_to_the_same_logits(
    kind: str, ids: Tensor, tmp_path: Path
) -> None:
    model = adapted(kind)
    before = model.eval()(ids).logits.detach()
    trainer(model, tmp_path, 2).train()
    wanted = model.eval()(ids).logits.detach()
    assert not torch.equal(wanted, before)
    checkpoint = tmp_path / "checkpoint-2"
    held = load_file(checkpoint / "model.safetensors")
    copies = [key for key in held if ".lora.default.module." in key]
    assert len(copies) == 1  # tied, so once
    again = adapted(kind)
    trainer(again, tmp_path / "again", 2).train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(again.eval()(ids).logits, wanted)
    head = again.get_output_embeddings()
    assert head.weight is again.get_input_embeddings().weight and head.weight is head.lora["default"].module.weight
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(base(ids).logits, BUILD[kind]()(ids).logits)  # the base itself, under its own names


@pytest.mark.parametrize("kind", list(BUILD))
@pytest.mark.parametrize("unload", [False, True])
def test_trainer_checkpoint_of_tied_and_merged_whole_modules_reloads_to_the_same_logits(
    kind: str, unload: bool, ids: Tensor, tmp_path: Path
) -> None:
    model = randomize(adapted(kind))
    lora.merge(model, unload=unload)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("acts", [True, False])
@pytest.mark.parametrize("settings", [{"bias": "all"}, {"train": ["ln_f", "wte", "lm_head"], "bias": "all"}])
def test_a_copy_that_shares_frozen_tensors_with_its_base_is_saved_and_the_base_keeps_its_names(
    settings: dict[str, Any], acts: bool, ids: Tensor, tmp_path: Path
) -> None:
    model = randomize(adapted("gpt2", **({"train": []} | settings)))
    if not acts:
        lora.activate(model, None)
    wanted = model(ids).logits
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = tiny_gpt2()
    assert same_bits(snapshot(base), snapshot(plain))
    again = adapted("gpt2", **({"train": []} | settings))
    missing, unexpected = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not unexpected
    assert all(".lora." in name or name == "lm_head.weight" for name in missing)
    lora.activate(again, "default" if acts else None)
    assert torch.equal(again(ids).logits, wanted)


def test_two_adapters_with_tied_copies_are_saved_each_with_its_values(ids: Tensor, tmp_path: Path) -> None:
    def two() -> nn.Module:
        model = adapted("llama")
        return lora.inject(model, r=2, targets=["k_proj"], train=ENDS["llama"], name="other")

    model = randomize(two())
    model.save_pretrained(tmp_path)
    again = two()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    for name in ("default", "other"):
        for each in (model, again):
            lora.activate(each, name)
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_model_without_tied_weights_writes_every_copy(tmp_path: Path) -> None:
    model = randomize(lora.inject(tiny_bert(), r=2, targets=["query"], train=["classifier"]))
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert {"classifier.lora.default.module.weight", "classifier.lora.default.module.bias"} <= held.keys()
