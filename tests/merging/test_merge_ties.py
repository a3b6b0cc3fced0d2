"""merge: modules that share their weights."""

import pytest
import torch
from torch import nn

import lora
from conftest import randomize, same_bits, snapshot, tiny_llama, unchanged
from two_kinds import TwoKinds, merge


def test_tied_linears_are_refused() -> None:
    model = TwoKinds()
    model.other = nn.Linear(160, 192)
    model.other.weight = model.linear.weight
    lora.inject(model, targets=["linear"])
    randomize(model)
    with unchanged(model), pytest.raises(lora.LoraError, match=r"linear\.weight and other\.weight"):
        lora.merge(model)


@pytest.mark.parametrize("how", ["same storage", "transpose"])
def test_weights_that_share_memory_are_refused_as_tied(how: str) -> None:
    model = nn.Module()
    model.linear = nn.Linear(16, 16)
    model.other = nn.Linear(16, 16)
    model.other.weight = nn.Parameter(model.linear.weight.data.t() if how == "transpose" else model.linear.weight.data)
    lora.inject(model, targets=["linear"])
    randomize(model)
    with unchanged(model), pytest.raises(lora.LoraError, match=r"tied|memory"):
        lora.merge(model)


def test_tied_biases_are_refused_or_right() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].bias = model[0].bias
    x = torch.randn(5, 6)
    try:
        lora.inject(model, targets=["0", "1"], bias="lora_only")
    except lora.LoraError:
        return
    randomize(model)
    before = model(x)
    try:
        lora.merge(model)
    except lora.LoraError:
        return
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


def test_tied_pair_trained_whole_merges_and_comes_back_tied() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    base = snapshot(model)
    lora.inject(model, targets=["q_proj"], train=["embed_tokens", "lm_head"])
    randomize(model)
    ids = torch.arange(1, 12)[None]
    before = model(ids).logits
    merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, base["lm_head.weight"])
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
    lora.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(ids).logits, before)
    lora.remove(model)
    assert same_bits(snapshot(model), base)
