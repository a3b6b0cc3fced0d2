"""What was silent: PEFT over our adapters, ours over PEFT's, and save_pretrained of an adapted model."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import lora
from conftest import randomize, refused, tiny_llama, unchanged
from lora.integrations import adapters_only

THEIRS = peft.LoraConfig(target_modules=["v_proj"])


def ours(**settings: Any) -> Any:
    return randomize(lora.inject(tiny_llama(), r=2, targets=["q_proj"], **settings))


@pytest.mark.parametrize(
    "over",
    [
        lambda model: peft.get_peft_model(model, THEIRS),
        lambda model: peft.get_peft_model(model, peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])),
        lambda model: peft.inject_adapter_in_model(THEIRS, model),
        lambda model: peft.prepare_model_for_kbit_training(model),
        lambda model: model.add_adapter(THEIRS),
    ],
    ids=["get_peft_model", "ia3", "inject_adapter", "kbit", "add_adapter"],
)
@pytest.mark.parametrize("state", ["acts", "rests", "merged"])
def test_peft_over_an_adapter_is_refused_and_changes_nothing(over: Callable[[nn.Module], object], state: str) -> None:
    model = ours()
    if state == "rests":
        lora.activate(model, None)
    if state == "merged":
        lora.merge(model)
    refused(lambda: over(model), model, "it carries default, and PEFT would freeze it")


def test_after_remove_or_unload_peft_may_come() -> None:
    model = ours()
    lora.remove(model)
    assert peft.get_peft_model(model, THEIRS)
    other = ours()
    lora.merge(other, unload=True)
    assert peft.get_peft_model(other, THEIRS)


@pytest.mark.parametrize("inner", [False, True])
def test_an_adapter_over_pefts_is_refused(inner: bool) -> None:
    model: Any = peft.get_peft_model(tiny_llama(), THEIRS)
    model = model.base_model.model if inner else model
    refused(lambda: lora.inject(model, r=2, targets="all-linear"), model, "it is wrapped by PEFT")
    assert lora.inject(peft.get_peft_model(tiny_llama(), THEIRS).unload(), r=2, targets=["q_proj"])


def test_load_over_pefts_is_refused(tmp_path: Path) -> None:
    lora.save(ours(), tmp_path)
    model: Any = peft.get_peft_model(tiny_llama(), THEIRS)
    with pytest.raises(lora.LoraError, match="it is wrapped by PEFT"):
        lora.load(model, tmp_path)


@pytest.mark.parametrize("acts", [True, False])
def test_save_pretrained_says_once_and_by_name_that_the_adapter_will_not_come_back(acts: bool, tmp_path: Path) -> None:
    model = ours(name="support")
    if not acts:
        lora.activate(model, None)
    with pytest.warns(lora.LoraWarning, match="save_pretrained: support will not come back") as told:
        model.save_pretrained(tmp_path)
    assert len(told) == 1
    assert told[0].filename == __file__
    model.save_pretrained(tmp_path)  # a second time: LoraWarning is an error here
    with unchanged(model):
        base = AutoModelForCausalLM.from_pretrained(tmp_path)  # what was told
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(base(ids).logits, tiny_llama()(ids).logits)


def test_a_state_dict_that_is_asked_for_otherwise_and_a_merged_model_say_nothing(tmp_path: Path) -> None:
    model = ours()
    model.state_dict()
    lora.merge(model)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    lora.remove(model)
    model.save_pretrained(tmp_path)


def test_a_second_adapter_is_told_of_too(tmp_path: Path) -> None:
    model = ours()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora.LoraWarning)
        model.save_pretrained(tmp_path)
    lora.inject(model, r=2, targets=["k_proj"], name="second")
    with pytest.warns(lora.LoraWarning, match="save_pretrained: second will not come back"):
        model.save_pretrained(tmp_path)


def test_names_are_listed_and_nothing_of_others_is_imported_for_them() -> None:
    code = """
import sys, lora.integrations
assert set(dir(lora.integrations)) == {"LightningAdapters", "adapters_only", "merged_weights", "reference"}
lora.integrations.adapters_only, lora.integrations.reference, lora.integrations.merged_weights
assert not {"transformers", "trl", "accelerate", "lightning", "peft"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert callable(adapters_only)
