"""A LLaMA-Adapter while tokens are generated: caches, padding, beams, packs, and another adapter for each row."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import lora
from lora import LoraError, llama_adapter
from tiny_decoders import X, adapted, bits, llama, opened, parts, without

NEW = 6


@pytest.fixture
def model() -> Any:
    return adapted(llama())


def greedy(model: Any, ids: Tensor) -> Tensor:
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def written(model: Any, ids: Tensor, **settings: Any) -> Tensor:
    mask = torch.ones_like(ids) if "attention_mask" not in settings else settings.pop("attention_mask")
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **settings)


def counted(model: Any, length: int = 5) -> list[int]:
    """How often the prompts, of this length, went through the last layer's key projection: grows while it is used."""
    calls: list[int] = []
    projection = model.model.layers[-1].self_attn.k_proj
    projection.register_forward_pre_hook(lambda _, args: calls.append(1) if args[0].shape[:2] == (1, length) else None)
    return calls


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_a_cache_changes_nothing_and_the_prompts_are_projected_once(model: Any, cache: str) -> None:
    calls, settings = counted(model), {"use_cache": False} if cache == "none" else {}
    if cache == "static":
        settings["cache_implementation"] = "static"
    new = written(model, X, **settings)
    assert len(calls) == (NEW if cache == "none" else 1)
    assert torch.equal(new, greedy(model, X))


def test_a_static_cache_that_is_used_again_has_nothing_of_before(model: Any) -> None:
    from transformers import StaticCache

    cache = StaticCache(model.config, max_cache_len=32)
    one = X[:, :1]  # a prompt of one token looks as a step does
    for seed in (1, 2):
        with torch.no_grad():
            for part in parts(model):
                part.prompts.normal_(generator=torch.Generator().manual_seed(seed))
        new = written(model, one, past_key_values=cache)
        assert torch.equal(new, greedy(model, one))
        cache.reset()


def test_another_adapter_with_the_same_cache_is_not_the_first(model: Any) -> None:
    adapted(model, seed=2, name="two", layers=3)
    cache = None
    for name in ("default", "two", "default"):
        lora.activate(model, name)
        with torch.no_grad():
            out = model(X if cache is None else X[:, :1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        if name == "two":
            two = out.logits
    twin = adapted(adapted(llama()), seed=2, name="two", layers=3)
    lora.activate(twin, "default")
    with torch.no_grad():
        cache = twin(X, use_cache=True).past_key_values
        del cache.lora_prompts
        lora.activate(twin, "two")
        assert torch.equal(twin(X[:, :1], past_key_values=cache).logits, two)


def test_training_with_a_cache_keeps_nothing(model: Any) -> None:
    out = model(X, labels=X, use_cache=True)
    assert not hasattr(out.past_key_values, "lora_prompts")
    out.loss.backward()
    assert parts(model)[0].prompts.grad.abs().sum() > 0


def test_left_padding_changes_no_row(model: Any) -> None:
    short = X[1:, 3:]
    ids = torch.cat([X[:1], torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)])
    new = written(model, ids, attention_mask=(ids != 0).long())
    assert torch.equal(new[0], written(model, X[:1])[0])
    assert torch.equal(new[1, 3:], written(model, short)[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left_gives_the_logits_of_the_row_alone(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    short = X[1:, 3:]
    ids = torch.cat([X[:1], torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)])
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(logits[1, 3:], model(short).logits[0], atol=1e-5)


def test_beam_search_and_several_answers(model: Any) -> None:
    beams = written(model, X, num_beams=3, num_return_sequences=2)
    assert torch.equal(beams, written(model, X, num_beams=3, num_return_sequences=2, use_cache=False))
    assert not torch.equal(beams, written(opened(model, seed=9), X, num_beams=3, num_return_sequences=2))


def test_packed_rows_are_as_they_are_alone(model: Any) -> None:
    """As our packing lays them: positions begin again, no mask, no cache."""
    packed = torch.cat([X[:1, :5], X[1:, :4]], 1)
    positions = torch.tensor([[*range(5), *range(4)]])
    logits = model(packed, position_ids=positions, attention_mask=None, use_cache=False).logits[0]
    assert torch.allclose(logits[:5], model(X[:1, :5]).logits[0], atol=1e-5)
    assert torch.allclose(logits[5:], model(X[1:, :4]).logits[0], atol=1e-5)
    with torch.enable_grad():  # and no gradient goes from one to the other
        embedded = model.get_input_embeddings()(packed).detach().requires_grad_()
        out = model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits
        (gradient,) = torch.autograd.grad(out[0, 5:].sum(), embedded)
    assert gradient[0, :5].abs().max() == 0 and gradient[0, 5:].abs().max() > 0


@pytest.mark.slow  # transformers' manager takes its time
def test_continuous_batching(model: Any) -> None:
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, num_blocks=16, block_size=32, max_batch_tokens=64
    )
    found = model.generate_batch([row.tolist() for row in X], generation_config=settings)
    new = sorted(each.generated_tokens for each in found.values())
    assert new == sorted(written(model, X)[:, X.shape[1] :].tolist())


# Another adapter for each row.


@pytest.fixture
def three() -> Any:
    """Adapters of different length and depth, and one low-rank adapter that acts on all rows."""
    model = adapted(adapted(llama(), name="a"), seed=2, name="b", layers=3, prompt_length=2)
    lora.inject(model, r=2, targets=["q_proj", "k_proj"], name="low")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".low.B"):
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    return model


def alone(model: Any, name: str | None, row: Tensor) -> Tensor:
    lora.activate(model, [*([name] if name else []), "low"])
    logits = model(row).logits
    lora.activate(model, "low")
    return logits


def test_rows_warn_of_checkpoints_that_would_not_notice_others(three: Any) -> None:
    three.train().enable_input_require_grads()
    for reentrant in (True, False):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            three.gradient_checkpointing_enable({"use_reentrant": reentrant})
            with llama_adapter.rows(three, ["a", None]):
                three(X, use_cache=False).logits.sum().backward()
        assert any("call backward() within the block" in str(each.message) for each in told) == reentrant


def test_each_row_has_the_adapter_of_its_name(three: Any) -> None:
    names, ids = ["a", None, "b", "a"], torch.cat([X, X.flip(1)])
    wanted = torch.cat([alone(three, name, ids[i : i + 1]) for i, name in enumerate(names)])
    before = three(ids).logits
    with llama_adapter.rows(three, names):
        assert torch.allclose(three(ids).logits, wanted, atol=1e-5)
        assert torch.equal(bits(three(ids).logits[1]), bits(before[1]))
        three(ids).logits[0].sum().backward()
    assert torch.equal(three(ids).logits, before)
    grads = {name for name, p in three.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(".a." in name for name in grads) and not any(".b." in name for name in grads)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generation_by_row(three: Any, settings: dict[str, Any]) -> None:
    wanted = []
    for i, name in enumerate(("a", "b")):
        lora.activate(three, [name, "low"])
        wanted.append(written(three, X[i : i + 1], **settings))
    lora.activate(three, "low")
    with llama_adapter.rows(three, ["a", "b"]):
        assert torch.equal(written(three, X, **settings), torch.cat(wanted))


def test_rows_follow_what_is_done_within_them(three: Any) -> None:
    wanted = torch.cat([alone(three, name, X[i : i + 1]) for i, name in enumerate(("a", "b"))])
    bare = three(X).logits
    with llama_adapter.rows(three, ["a", "b"]):
        lora.activate(three, ["b", "low", "a"])
        assert torch.allclose(three(X).logits, wanted, atol=1e-5)
        with lora.disabled(three):
            assert torch.equal(three(X).logits, without(three, X))
        with llama_adapter.rows(three, [None, "b"]):
            assert torch.allclose(three(X).logits, torch.stack([bare[0], wanted[1]]), atol=1e-5)
        assert torch.allclose(three(X).logits, wanted, atol=1e-5)
        compiled = torch.compile(three, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(X, use_cache=False).logits, wanted, atol=1e-5)
    assert torch.equal(three(X).logits, bare)


def test_rows_that_do_not_fit_are_told_of(three: Any) -> None:
    before = three(X).logits
    for names, words in (
        (["a", "c"], "'c' is not there"), (["a", "low"], "'low' trains more than prompts"), ([], "a list of a name"),
        ("ab", "a list of a name"), (None, "names: got None"), (2, "names: got 2"),
    ):  # fmt: skip
        with pytest.raises(LoraError, match=words), llama_adapter.rows(three, names):
            pass
    with (
        pytest.raises(LoraError, match="3 rows are told of, and the batch has 2"),
        llama_adapter.rows(three, ["a"] * 3),
    ):
        three(X)
    assert torch.equal(three(X).logits, before)
    assert [a.rows for a in (layer.self_attn.lora for layer in three.model.layers)] == [None] * 3


@pytest.mark.slow  # torch compiles it
def test_flex_attention() -> None:
    model = adapted(llama(hidden_size=64))
    wanted = model(X).logits
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        assert torch.allclose(model(X).logits, wanted, atol=1e-4)
