"""What is kept of prompts while tokens are generated, and who must not take it for its own: copies, and later ones."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

import lora
from lora import LoraError, llama_adapter
from tiny_decoders import X, adapted, llama, parts

TOKENS, DIM = 3, 8
FEATURES = torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(5))


def begun(model: Any) -> Any:
    with torch.no_grad():
        return model(X, use_cache=True).past_key_values


def bare(cache: Any) -> Any:
    """The cache of the sequence, with nothing kept of prompts."""
    found = copy.deepcopy(cache)
    del found.lora_prompts
    return found


def step(model: Any, cache: Any) -> Tensor:
    """The logits of one more token."""
    with torch.no_grad():
        logits: Tensor = model(X[:, :1], past_key_values=cache).logits
    return logits


def test_a_copy_of_a_model_does_not_go_on_with_what_was_kept_of_the_first() -> None:
    model = adapted(llama())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for part in parts(twin):
                part.prompts.normal_()
        cache = begun(model)
        own = step(twin, bare(cache))
        assert torch.equal(step(twin, cache), own)


def test_low_rank_adapters_that_come_to_act_change_what_was_kept() -> None:
    model = adapted(llama())
    lora.inject(model, r=2, targets=["k_proj", "v_proj"], name="low")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".low." in name:
                parameter.normal_()
    lora.activate(model, "default")
    cache = begun(model)
    lora.activate(model, ["default", "low"])
    own = step(model, bare(cache))
    assert torch.equal(step(model, cache), own)


def test_compiled_steps_are_compiled_once_for_all_features() -> None:
    """Each `condition` block is another one to the cache, and none to the code."""
    model, counter = adapted(llama(), features=(TOKENS, DIM)), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(4):
        features = torch.randn(FEATURES.shape, generator=torch.Generator().manual_seed(seed))
        with llama_adapter.condition(model, features), torch.no_grad():
            cache = StaticCache(model.config, max_cache_len=16)
            model(X, past_key_values=cache)
            own = step(model, copy.deepcopy(cache))
            assert torch.allclose(step(compiled, cache), own, atol=1e-6)
            step(compiled, cache)
        if seed == 1:
            before = counter.frame_count
    assert counter.frame_count == before
    with llama_adapter.condition(model, FEATURES):  # and what was kept of others is not read
        own = step(model, bare(cache))
        assert torch.allclose(step(compiled, cache), own, atol=1e-6)


def test_a_copy_that_is_made_within_a_block_has_no_features() -> None:
    model = adapted(llama(), features=(TOKENS, DIM))
    features = torch.nn.Linear(DIM, DIM)(FEATURES)  # which cannot be copied themselves
    with llama_adapter.condition(model, features):
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        wanted = model(X).logits
    for twin in twins:
        with pytest.raises(LoraError, match="features: .*this call has none"):
            twin(X)
        with llama_adapter.condition(twin, features):
            assert torch.equal(twin(X).logits, wanted)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_as_many_rows_as_beams_are_not_as_many_as_rows(settings: dict[str, Any]) -> None:
    """Of a batch of two that generation doubles there are four rows, which four given ones would fit by accident."""
    model = adapted(adapted(llama(), name="a"), name="b", features=(TOKENS, DIM))
    call = {"attention_mask": torch.ones_like(X), "max_new_tokens": 2, **settings}
    four = torch.cat([FEATURES, FEATURES.flip(0)])
    with llama_adapter.condition(model, four), pytest.raises(LoraError, match="have 4 rows, and the batch has 4"):
        model.generate(X, **call)
    with llama_adapter.rows(model, ["a", None] * 2), pytest.raises(LoraError, match="4 rows are told of"):
        model.generate(X, **call)
    with llama_adapter.rows(model, ["a"]), pytest.raises(LoraError, match="1 rows are told of, and the batch has 2"):
        model(X)
