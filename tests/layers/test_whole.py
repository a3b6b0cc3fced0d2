"""Modules that an adapter trains whole, or for their bias."""

import contextlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize, same_bits, snapshot
from lora import LoraError
from lora.layers import hosts
from small_net import Net, X, acts, original


class OwnBias(nn.Module):
    """A block with a bias of its own beside the linear inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + self.bias


@pytest.mark.parametrize("root", [True, False])
def test_bias_all_in_a_block_around_a_target_acts(root: bool) -> None:
    model = OwnBias() if root else nn.Sequential(nn.Linear(6, 6), OwnBias())
    with contextlib.suppress(LoraError):  # refusing is as good as acting
        lora.inject(model, targets=["lin"], bias="all")
    assert not list(hosts(model)) or acts(model, X)


def test_two_adapters_on_a_block_and_inside_it_act_or_are_refused() -> None:
    for first, second in (({"train": ["block"]}, {"bias": "all"}), ({"bias": "all"}, {"train": ["block"]})):
        block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6))
        model = nn.Sequential(OrderedDict(lin=nn.Linear(6, 6), block=block))
        lora.inject(model, targets=["lin"], name="a", **first)
        keys = list(model.state_dict())
        try:
            lora.inject(model, targets=["lin"], name="b", **second)
            lora.activate(model, ["a", "b"])
        except LoraError:
            assert list(model.state_dict())[: len(keys)] == keys
            continue
        assert not any(key.count(".lora.") > 1 for key in model.state_dict())
        assert acts(model, X)


def test_forward_hooks_of_a_module_trained_whole_run_once() -> None:
    model = Net()
    calls = []
    model.norm.register_forward_hook(lambda module, args, out: calls.append(1) or out * 2)
    model.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    before = model(X)
    lora.inject(model, targets=["0"], train=["norm"])
    calls.clear()
    assert torch.equal(model(X), before)  # a fresh adapter changes no bit
    assert len(calls) == 1


def test_training_a_module_without_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    before = original(model)
    with pytest.raises(LoraError, match="train"):
        lora.inject(model, targets=["0"], train=["1"])
    assert original(model) == before


def test_batchnorm_trained_whole_keeps_its_statistics_apart(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

    model = build().train()
    before = snapshot(model)
    lora.inject(model, targets=["0"], train=["1"])
    randomize(model)
    model(X)
    lora.save(model, tmp_path)
    wanted = model.eval()(X)
    other = lora.load(build().eval(), tmp_path)
    assert torch.equal(other(X), wanted)
    lora.remove(model)
    assert same_bits(snapshot(model), before)
