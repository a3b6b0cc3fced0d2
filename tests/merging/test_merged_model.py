"""A model while it is merged: disabled, copied, saved, cast."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora
from conftest import same_bits, snapshot, unchanged
from lora.layers import adapters_of, hosts
from two_kinds import TwoKinds, merge, merged_model, scale_updates


def test_disabled_in_merged_is_the_base_and_merged_again_after() -> None:
    model, before = merged_model()
    with unchanged(model):
        with lora.disabled(model):
            assert same_bits(snapshot(model), before)
            assert type(model.linear) is nn.Linear
            with lora.disabled(model):
                assert same_bits(snapshot(model), before)
            assert same_bits(snapshot(model), before)
        with pytest.raises(KeyError), lora.disabled(model):
            raise KeyError


def test_merge_in_disabled_ends_with_the_block() -> None:
    model, _ = merged_model()
    lora.unmerge(model)
    with unchanged(model), lora.disabled(model):
        with pytest.raises(lora.LoraError, match="no adapter acts"):
            lora.merge(model)
        lora.activate(model, "default")
        merge(model)
    with unchanged(model), contextlib.suppress(KeyError), lora.disabled(model):
        lora.activate(model, "default")
        merge(model)
        raise KeyError
    assert type(model.linear).__name__ != "Linear"


def test_merged_in_disabled_in_merged() -> None:
    model, _ = merged_model()
    with unchanged(model), lora.disabled(model):
        lora.activate(model, "default")
        merge(model)
        with lora.disabled(model):
            pass


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("merged", [True, False])
def test_copies_unmerge_on_their_own(how: str, merged: bool) -> None:
    model, before = merged_model()
    if not merged:
        lora.unmerge(model)
    x = torch.randn(4, 160, dtype=torch.bfloat16)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    values = snapshot(model)
    assert torch.equal(other(x), model(x))
    assert same_bits(snapshot(other), values)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    if merged:
        lora.unmerge(other)
        assert same_bits(snapshot(other), before)
        assert same_bits(snapshot(model), values)  # no shared memory
    adapters_of(other.linear)["default"].B.data.zero_()
    assert same_bits(snapshot(model), values)
    lora.remove(other)
    assert type(other.linear) is nn.Linear
    assert type(other.conv) is Conv1D
    assert len(list(hosts(model))) == 2


def test_state_dict_of_a_merged_model_loads_back() -> None:
    model, before = merged_model()
    merged = snapshot(model)
    model.load_state_dict(merged)
    lora.unmerge(model)
    assert same_bits(snapshot(model), before)
    merge(model)
    model.load_state_dict(before)  # the weights of the unmerged model, into a model that takes itself for merged
    with unchanged(model), pytest.raises(lora.LoraError, match="changed after the merge"):
        lora.unmerge(model)


def test_cast_while_merged_is_refused_at_unmerge_and_keeps_the_merged_values() -> None:
    model, _ = merged_model(torch.float32)
    model.to(torch.bfloat16)
    with unchanged(model), pytest.raises(lora.LoraError, match=r"float32 and is torch\.bfloat16"):
        lora.unmerge(model)
    with unchanged(model), pytest.raises(lora.LoraError), lora.disabled(model):
        pass


def test_merge_under_inference_mode_comes_back_outside_it() -> None:
    model = TwoKinds(dtype=torch.bfloat16)
    lora.inject(model, targets=["linear", "conv"], bias="lora_only")
    scale_updates(model, 0.2)
    before = snapshot(model)
    with torch.inference_mode():
        merge(model)
    lora.unmerge(model)
    assert same_bits(snapshot(model), before)
    model(torch.randn(2, 160, dtype=torch.bfloat16)).float().sum().backward()
    assert adapters_of(model.linear)["default"].B.grad is not None
