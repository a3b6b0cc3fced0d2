"""param_groups: every parameter that trains, once, with the rate and the decay that are its own."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import lora
from conftest import tiny_bert, tiny_llama
from lora import LoraError

TARGETS = ["q_proj", "v_proj", "down_proj"]


def names(model: nn.Module, group: dict[str, Any]) -> set[str]:
    known = {id(p): name for name, p in model.named_parameters()}
    return {known[id(p)] for p in group["params"]}


def by_name(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in groups}


@pytest.mark.parametrize("dora", [False, True])
def test_b_has_the_multiple_and_all_that_trains_is_there_once(dora: bool) -> None:
    model = lora.inject(tiny_llama(), r=1, targets=TARGETS, dora=dora)  # vectors by shape, matrices by what they are
    groups = lora.param_groups(model, lr=1e-4, lora_plus=16, weight_decay=0.1)
    found = by_name(groups)
    assert names(model, found["B"]) == {n for n, _ in model.named_parameters() if n.endswith(".B")}
    assert names(model, found["A"]) == {n for n, _ in model.named_parameters() if n.endswith(".A")}
    assert ("vectors" in found) == dora  # the magnitudes
    assert (found["A"]["lr"], found["B"]["lr"]) == (1e-4, 16e-4)
    assert {group["name"]: group["weight_decay"] for group in groups if group["name"] != "vectors"} == {
        "A": 0.1,
        "B": 0.1,
    }
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything))
    assert set(everything) == {id(p) for p in model.parameters() if p.requires_grad}


def test_vectors_have_no_decay_and_what_trains_whole_keeps_the_rate() -> None:
    model = lora.inject(tiny_bert(), r=2, targets=["query", "word_embeddings"], bias="lora_only", train=["classifier"])
    found = by_name(lora.param_groups(model, lr=1e-3, lora_plus=4, weight_decay=0.01))
    assert {name: (group["lr"], group["weight_decay"]) for name, group in found.items()} == {
        "A": (1e-3, 0.01), "B": (4e-3, 0.01), "matrices": (1e-3, 0.01), "vectors": (1e-3, 0.0),
    }  # fmt: skip
    assert all("query" in name for name in names(model, found["B"]))
    matrices = names(model, found["matrices"])  # both halves of the embedding, and the classifier's weight
    assert {name.rpartition(".")[2] for name in matrices if "word_embeddings" in name} == {"A", "B"}
    assert any("classifier" in name for name in matrices)
    assert all(name.endswith("bias") for name in names(model, found["vectors"]))


def test_a_step_moves_b_as_far_as_the_multiple_says() -> None:
    model = lora.inject(tiny_llama(), r=2, targets=TARGETS).train()
    groups = lora.param_groups(model, lr=2.0, lora_plus=8)
    optimizer = torch.optim.SGD(groups, lr=1e-9)  # the groups' own rates hold
    A, B = (groups[n]["params"][0] for n in (0, 1))
    nn.init.normal_(B)
    before = A.detach().clone(), B.detach().clone()
    model(torch.arange(1, 20)[None]).logits.square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(before[0] - A.detach(), 2 * A.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(before[1] - B.detach(), 16 * B.grad, rtol=1e-3, atol=1e-5)


def test_the_groups_are_those_of_peft() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    theirs = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS))
    optimizer: Any = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {
        n.removeprefix("base_model.model."): rates[id(p)] for n, p in theirs.named_parameters() if p.requires_grad
    }
    model = lora.inject(tiny_llama(), r=2, targets=TARGETS)
    known = {id(p): name for name, p in model.named_parameters()}
    found = {
        known[id(p)].replace("lora.default.", "lora_") : group["lr"]
        for group in lora.param_groups(model, lr=1e-4, lora_plus=16) for p in group["params"]
    }  # fmt: skip
    assert found == {name.replace(".default.weight", ""): rate for name, rate in expected.items()}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lr": 0}, "lr: got 0; a finite number above 0"),
        ({"lr": "1e-4"}, "lr: got '1e-4'"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"lr": 1e-4, "lora_plus": -1}, "lora_plus: got -1; a finite number above 0"),
        ({"lr": 1e-4, "weight_decay": -0.1}, "weight_decay: got -0.1; a finite number of at least 0"),
    ],
)
def test_wrong_numbers_are_told(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        lora.param_groups(lora.inject(tiny_llama(), r=2, targets=TARGETS), **keywords)


def test_a_model_of_which_nothing_trains_is_refused() -> None:
    with pytest.raises(LoraError, match="none of its parameters trains"):
        lora.param_groups(tiny_llama().requires_grad_(False), lr=1e-4)
