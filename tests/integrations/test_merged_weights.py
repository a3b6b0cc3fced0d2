"""The weights of a merge that is not done: names, shapes and values of the real one."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lora
from conftest import MODELS, randomize, same_bits, snapshot, tiny_bert, tiny_gpt2, tiny_llama, unchanged
from lora.integrations import merged_weights
from quantized_base import llama as quantized_llama

SETTINGS: list[dict[str, Any]] = [
    {},
    {"dora": True},
    {"bias": "all"},
    {"bias": "lora_only"},
]


def merged(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters after the real merge, each under its first name."""
    lora.merge(model, unload=True)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_names_order_and_bits_are_those_of_a_real_merge(architecture: str, settings: dict[str, Any]) -> None:
    build, targets = MODELS[architecture]
    model = randomize(lora.inject(build(), r=3, targets=targets, **settings))
    with unchanged(model):
        found = dict(merged_weights(model))
    assert list(found) == [name for name, _ in build().named_parameters()]
    assert all(value.shape == p.shape for (_, p), value in zip(build().named_parameters(), found.values(), strict=True))
    assert same_bits(found, merged(model))


def test_modules_trained_whole_give_their_copies() -> None:
    model = lora.inject(tiny_bert(), r=2, targets=["query"], train=["classifier", "encoder.layer.1.output"])
    randomize(model)
    found = dict(merged_weights(model))
    assert list(found) == [name for name, _ in tiny_bert().named_parameters()]
    assert same_bits(found, merged(model))


def test_tied_copies_come_once_and_embeddings_are_targets_too() -> None:
    tied = randomize(lora.inject(tiny_gpt2(), r=2, targets=["c_attn"], train=["wte", "lm_head"]))
    found = dict(merged_weights(tied))
    assert "lm_head.weight" not in found
    assert same_bits(found, merged(tied))
    table = randomize(lora.inject(tiny_llama(tie_word_embeddings=False), r=2, targets=["embed_tokens", "q_proj"]))
    assert same_bits(dict(merged_weights(table)), merged(table))


def test_half_precision_rounds_once_as_a_merge_does() -> None:
    model = randomize(lora.inject(tiny_llama().to(torch.bfloat16), r=2, targets=["q_proj"]), std=1.0)
    found = dict(merged_weights(model))
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert same_bits(found, merged(model))


def test_several_adapters_none_and_a_merged_model() -> None:
    model = randomize(lora.inject(tiny_llama(), r=2, targets=["q_proj"]))
    randomize(lora.inject(model, r=3, targets=["q_proj", "up_proj"], name="second"), seed=4)
    lora.activate(model, None)
    assert same_bits(dict(merged_weights(model)), snapshot(tiny_llama()))
    lora.activate(model, ["default", "second"])
    found = dict(merged_weights(model))
    lora.merge(model)
    assert same_bits(dict(merged_weights(model)), found)
    lora.unmerge(model)
    assert same_bits(found, merged(model))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_of_a_quantized_base_all_comes_in_16_bits(kind: str) -> None:
    model = randomize(lora.inject(quantized_llama(kind), r=2, targets=["q_proj"]))
    found = dict(merged_weights(model))
    plain = {n: p.shape for n, p in quantized_llama(None).named_parameters()}
    assert {name: value.shape for name, value in found.items()} == plain
    assert len({value.dtype for name, value in found.items() if name.endswith("proj.weight")}) == 1
    lora.merge(model, unload=True)
    own = dict(model.named_parameters())
    ours = [name for name in found if name.endswith("q_proj.weight")]
    assert all(torch.equal(found[name], own[name]) for name in ours)


def test_one_tensor_is_made_at_a_time() -> None:
    model = randomize(lora.inject(tiny_llama(), r=2, targets="all-linear"))
    made, steps = [], merged_weights(model)
    own = {p.data_ptr() for p in model.parameters()}
    for name, value in steps:
        fresh = value.data_ptr() not in own
        assert fresh == ("_proj" in name)
        made.append(name)
        del value
    assert made == [name for name, _ in tiny_llama().named_parameters()]


def test_what_cannot_be_merged_is_refused_before_the_first_tensor() -> None:
    model = lora.inject(tiny_llama(tie_word_embeddings=True), r=2, targets=["embed_tokens"])
    with pytest.raises(lora.LoraError, match="are tied"):
        merged_weights(model)
    wild = lora.inject(tiny_llama(), r=2, targets=["q_proj"])
    with torch.no_grad():
        next(p for p in wild.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(lora.LoraError, match="NaN or infinity"):
        merged_weights(wild)


def test_trls_weight_sync_sends_what_the_plain_model_would() -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    from lora.integrations.weights import Merged

    def sent(model: Any) -> dict[str, torch.Tensor]:
        sync = VLLMGeneration.__new__(VLLMGeneration)  # vLLM itself is not needed for what is sent to it
        sync.model, sync._dist = model, SimpleNamespace(is_fsdp=False, gather_params=lambda _: nullcontext())
        return dict(sync._iter_named_params())

    model = randomize(lora.inject(tiny_llama(), r=2, targets=["q_proj", "down_proj"]))
    through = sent(Merged(model))
    lora.merge(model, unload=True)
    assert same_bits(through, sent(model))
    assert Merged(model).config is model.config
