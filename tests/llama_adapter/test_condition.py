"""A LLaMA-Adapter that answers about features: of pictures, of sounds, of anything that comes with each row."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora
from lora import LoraError, llama_adapter
from lora.files.description import describe
from lora.llama_adapter import condition
from small_adapter import CONFIG, TENSORS
from tiny_decoders import X, adapted, bits, llama, parts

TOKENS, DIM, NEW = 3, 8, 6
FEATURES = torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(3))
FUSIONS = ["late", "early"]


@pytest.fixture(params=FUSIONS)
def model(request: pytest.FixtureRequest) -> Any:
    return adapted(llama(), features=(TOKENS, DIM), fusion=request.param)


def logits(model: Any, features: Tensor = FEATURES, ids: Tensor = X) -> Tensor:
    with condition(model, features):
        return model(ids).logits.detach()


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_fresh_adapter_is_the_base_to_the_bit(fusion: str) -> None:
    base = llama()
    wanted = base(X).logits
    llama_adapter.inject(base, layers=2, features=(TOKENS, DIM), fusion=fusion)
    assert same(logits(base), wanted)
    assert all("features" in n or "prompts" in n or "gate" in n for n, p in base.named_parameters() if p.requires_grad)
    lora.remove(base)
    assert same(base(X).logits, wanted)


def test_each_row_sees_its_own_features(model: Any) -> None:
    both = logits(model)
    for row in (0, 1):
        alone = logits(model, FEATURES[row : row + 1], X[row : row + 1])
        assert torch.allclose(alone[0], both[row], atol=1e-5)
    assert not torch.allclose(logits(model, FEATURES.flip(0)), both, atol=1e-2)


def test_late_features_are_a_projection_added_to_every_prompt() -> None:
    model = adapted(llama(), features=(TOKENS, DIM))
    first = parts(model)[0]
    vector = FEATURES[0].flatten() @ first.features.projection.weight.T + first.features.projection.bias
    twin = adapted(llama())
    with torch.no_grad():
        for own, other in zip(parts(twin), parts(model), strict=True):
            own.prompts.copy_(other.prompts + vector)
            own.gate.copy_(other.gate)
    assert torch.allclose(twin(X[:1]).logits, logits(model, FEATURES[:1], X[:1]), atol=1e-5)
    assert sum(p.numel() for p in first.features.parameters()) == (TOKENS * DIM + 1) * 32


def test_early_features_are_in_the_lowest_layers_and_prompts_in_the_top_ones() -> None:
    model = adapted(llama(), features=(TOKENS, DIM), fusion="early", layers=2)
    lowest, *top = parts(model)
    assert lowest.prompts is None and lowest.reads and lowest.features is not None
    assert len(top) == 2 and not any(part.reads for part in top) and all(part.prompts is not None for part in top)
    assert lowest.features(FEATURES).shape == (2, 5, 32)
    with torch.no_grad():
        lowest.gate.zero_()
    assert same(logits(model), logits(model, FEATURES.flip(0)))


def test_the_order_of_a_pictures_tokens_counts(model: Any) -> None:
    if (places := getattr(parts(model)[0].features, "places", None)) is not None:
        places.data.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(logits(model, FEATURES.flip(1)), logits(model), atol=1e-4)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generation_has_one_picture_for_each_row(model: Any, settings: dict[str, Any], cache: bool) -> None:
    def written(features: Tensor, ids: Tensor) -> Tensor:
        with condition(model, features):
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                use_cache=cache,
                **settings,
            )

    each = settings.get("num_return_sequences", 1)
    both = written(FEATURES, X)
    assert both.shape == (2 * each, X.shape[1] + NEW)
    for row in (0, 1):
        assert torch.equal(written(FEATURES[row : row + 1], X[row : row + 1]), both[row * each : (row + 1) * each])


def test_several_answers_are_drawn_for_one_picture(model: Any) -> None:
    with condition(model, FEATURES):
        torch.manual_seed(0)
        drawn = model.generate(
            X, attention_mask=torch.ones_like(X), max_new_tokens=NEW, do_sample=True, num_return_sequences=3
        )
    assert drawn.shape[0] == 6


def test_a_static_cache_and_left_padding_change_nothing(model: Any) -> None:
    settings = {"max_new_tokens": NEW, "do_sample": False}
    padded, mask = torch.nn.functional.pad(X, (3, 0)), torch.nn.functional.pad(torch.ones_like(X), (3, 0))
    with condition(model, FEATURES):
        wanted = model.generate(X, attention_mask=torch.ones_like(X), **settings)
        static = model.generate(X, attention_mask=torch.ones_like(X), cache_implementation="static", **settings)
        left = model.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(static, wanted) and torch.equal(left[:, 3:], wanted)


def test_a_cache_has_nothing_of_the_features_before(model: Any) -> None:
    from transformers import StaticCache  # whose reset empties it in every version

    one = X[:, :1]  # a prompt of one token looks as a step does
    cache = StaticCache(model.config, max_cache_len=16)
    with torch.no_grad():
        with condition(model, FEATURES):
            model(one, past_key_values=cache)
        cache.reset()
        with condition(model, FEATURES.flip(0)):
            again = model(one, past_key_values=cache).logits
    assert torch.allclose(again, logits(model, FEATURES.flip(0), one), atol=1e-5)


def test_a_step_of_a_generation_sees_the_features_of_its_own_block(model: Any) -> None:
    """The keys and values that are kept with a cache are of the features that made them."""
    steps = []
    with torch.no_grad():
        for features in (FEATURES, FEATURES.flip(0)):
            with condition(model, FEATURES):
                cache = model(X[:, :-1], use_cache=True).past_key_values
            with condition(model, features):
                steps.append(model(X[:, -1:], past_key_values=cache).logits)
    assert torch.allclose(steps[0], logits(model)[:, -1:], atol=1e-5)
    assert not torch.allclose(steps[1], steps[0], atol=1e-3)


def gradients(model: Any, **settings: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    if settings:
        model.gradient_checkpointing_enable(settings)
        model.enable_input_require_grads()
    with condition(model, FEATURES):
        for _ in range(2):  # two passes in one block, as accumulated steps do
            model(X, labels=X, use_cache=False).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_give_the_encoder_its_gradient(model: Any, reentrant: bool) -> None:
    plain = gradients(copy.deepcopy(model))
    assert any("features" in name for name in plain)
    assert all(n in plain and plain[n].abs().sum() > 0 for n, p in model.named_parameters() if p.requires_grad)
    found = gradients(model, use_reentrant=reentrant)
    assert found.keys() == plain.keys()
    assert all(torch.allclose(found[n], plain[n], atol=1e-5) for n in plain)


@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_code_reads_the_features_of_each_block(model: Any, more: bool) -> None:
    if more:
        fusion = "early" if parts(model)[0].prompts is None else "late"
        lora.remove(model)
        settings = {"features": (TOKENS, DIM), "fusion": fusion, "train_norms": True, "train_bias": True}
        llama_adapter.inject(model, 2, 5, **settings)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for features in (FEATURES, FEATURES.flip(0)):
        wanted = logits(model, features)
        with condition(compiled, features):
            assert torch.allclose(compiled(X).logits, wanted, atol=1e-5)
            compiled(X, labels=X).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_gradient_reaches_who_made_the_features(model: Any) -> None:
    features = FEATURES.clone().requires_grad_()
    with condition(model, features):
        model(X, labels=X).loss.backward()
    assert features.grad is not None and features.grad.abs().sum() > 0


def test_a_save_comes_back_to_the_bit(model: Any, tmp_path: Path) -> None:
    lora.save(model, tmp_path)
    other = lora.load(llama(), tmp_path)
    assert same(logits(other), logits(model))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "ADAPTION_PROMPT" and config["lora_features"] == [TOKENS, DIM]
    assert "3 x 8 features of each row" in str(describe(tmp_path))
    lora.save(other, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / TENSORS).read_bytes()


def test_a_file_of_other_sizes_is_refused_before_memory_is_taken(model: Any, tmp_path: Path) -> None:
    lora.save(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for sizes in ([10**9, 10**9], [0, 8], "many", [3, 8, 1]):
        (tmp_path / CONFIG).write_text(json.dumps({**config, "lora_features": sizes}))
        with pytest.raises(LoraError, match="lora_features is"):
            lora.load(llama(), tmp_path, check=False)


def test_off_on_and_away(model: Any) -> None:
    conditioned, base = logits(model), llama()(X).logits
    with lora.disabled(model):
        assert same(model(X).logits, base)
    lora.activate(model, None)
    assert same(model(X).logits, base)
    lora.activate(model, "default")
    assert same(logits(model), conditioned)
    assert same(logits(copy.deepcopy(model)), conditioned)
    assert "features" in str(lora.summary(model))


def test_forgotten_features_are_an_error_by_name(model: Any) -> None:
    logits(model)
    for call in (lambda: model(X), lambda: model.generate(X, max_new_tokens=2)):
        with pytest.raises(LoraError, match="features: the adapter that acts answers about features.*condition"):
            call()
    with pytest.raises(RuntimeError, match="inside"), condition(model, FEATURES):
        raise RuntimeError("inside")
    assert all(part.condition is None for part in parts(model))


def test_a_wrong_batch_is_an_error_also_where_it_would_divide(model: Any) -> None:
    for rows in (1, 4):
        with condition(model, FEATURES[:1].expand(rows, -1, -1)), pytest.raises(LoraError, match=f"have {rows} rows"):
            model(X)
    with condition(model, FEATURES[:1]), pytest.raises(LoraError, match="have 1 rows, and the batch has 6"):
        model.generate(X, attention_mask=torch.ones_like(X), max_new_tokens=2, num_beams=3)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (FEATURES[:, :, :4], r"got \(2, 3, 4\); \(batch, 3, 8\)"),
        (FEATURES[:, :2], r"got \(2, 2, 8\)"),
        (FEATURES[0], r"got \(3, 8\)"),
        (FEATURES.long(), "got torch.int64; a tensor of floats"),
        ("a picture", "got str; a tensor of floats"),
        (FEATURES * float("nan"), "NaN or infinite"),
    ],
)
def test_wrong_features_are_an_error_by_name(model: Any, features: Any, words: str) -> None:
    with pytest.raises(LoraError, match=words), condition(model, features):
        pass


def test_features_of_inference_mode_may_be_trained_on(model: Any) -> None:
    with torch.inference_mode():
        encoded = FEATURES * 1
    with condition(model, encoded):
        model(X, labels=X).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.inference_mode(), condition(model, encoded):
        assert same(model(X).logits, logits(model))


def test_who_reads_the_features_has_to_be_clear(model: Any) -> None:
    plain = adapted(llama())
    with pytest.raises(LoraError, match="no adapters that act read features.*inject"), condition(plain, FEATURES):
        pass
    llama_adapter.inject(model, layers=2, name="other", features=(TOKENS, DIM))
    lora.activate(model, ["default", "other"])
    with pytest.raises(LoraError, match="2 adapters that act read features; default, other would"):
        logits(model)
    with (
        pytest.raises(LoraError, match="no adapter 'othr' that reads features.*other"),
        condition(model, FEATURES, "othr"),
    ):
        pass
    with condition(model, FEATURES, "default"), condition(model, FEATURES.flip(0), "other"):
        model(X)


def test_settings_that_cannot_be(model: Any) -> None:
    for settings, words in (
        ({"features": (3,)}, "features: got .3.; .tokens, dim."),
        ({"features": (3, 0)}, "features: got"),
        ({"fusion": "early"}, "'early' beside features"),
        ({"features": (3, 8), "fusion": "middle"}, "fusion: got 'middle'"),
        ({"features": (3, 8), "fusion": "early", "layers": 3}, "layers: got 3, which is all"),
    ):
        with pytest.raises(LoraError, match=words):
            llama_adapter.inject(llama(), **settings)
