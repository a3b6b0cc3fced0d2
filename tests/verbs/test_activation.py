"""activate, disabled and remove: what acts, what trains and what stays."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora
from conftest import randomize, same_bits, snapshot
from lora import LoraError
from lora.layers import hosts
from small_net import Net, X, original


@pytest.fixture
def model() -> nn.Module:
    found = Net()
    lora.inject(found, r=2, targets=["0", "2"], name="a", train=["norm"])
    randomize(found, seed=1)
    lora.inject(found, r=3, targets=["0", "1"], name="b")
    return randomize(found, seed=2)


def test_what_trains_does_not_follow_what_acts(model: nn.Module) -> None:
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    for names in ("a", None, ["b", "a"], "b"):
        lora.activate(model, names)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    with lora.disabled(model):
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_gradients_reach_only_what_acts(model: nn.Module) -> None:
    lora.activate(model, "b")
    model(X).sum().backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    assert grads == {f"layers.{i}.lora.b.{t}" for i in (0, 1) for t in "AB"}


def test_remove_one_of_two_keeps_the_other_to_the_bit(model: nn.Module) -> None:
    lora.activate(model, "b")
    wanted = model(X)
    lora.activate(model, ["a", "b"])
    lora.remove(model, "a")
    assert torch.equal(model(X), wanted)
    assert not any(".a." in key for key in model.state_dict())
    assert type(model.norm) is nn.LayerNorm
    assert type(model.layers[2]) is Conv1D


def test_remove_restores_requires_grad_of_the_first_inject() -> None:
    model = Net()
    before = original(model)
    lora.inject(model, targets=["0"], name="a")
    lora.inject(model, targets=["1"], name="b")
    lora.remove(model, "a")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora." not in n)
    lora.remove(model, "b")
    assert original(model) == before


def test_removed_within_disabled_stays_away(model: nn.Module) -> None:
    with lora.disabled(model):
        lora.remove(model, "b")
    assert lora.summary(model).acting == []
    with lora.disabled(model):
        lora.remove(model)
    assert not list(hosts(model))
    assert original(model)[0] == original(Net())[0]


def test_removed_within_disabled_of_a_merged_model(model: nn.Module) -> None:
    lora.activate(model, ["a", "b"])
    lora.merge(model)
    with lora.disabled(model):
        lora.remove(model, "a")
    assert lora.summary(model).merged
    lora.remove(model)
    assert same_bits(snapshot(model), snapshot(Net()))


def test_merge_that_cannot_come_back_after_disabled_leaves_the_model_unmerged(model: nn.Module) -> None:
    lora.merge(model)
    with pytest.raises(LoraError, match="NaN"), lora.disabled(model):
        model.layers[0].lora["b"].A.data[0, 0] = torch.nan
    assert not lora.summary(model).merged
    lora.remove(model)
    assert same_bits(snapshot(model), snapshot(Net()))
