"""LLaMA-Adapter in a model: what a fresh one changes (nothing), the paper's formula, gradients, and the verbs."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lora
from lora import LoraError, LoraWarning, llama_adapter
from lora.updates import Prompts
from tiny_decoders import X, adapted, bits, llama, opened, parts, published, trainable, without


@pytest.fixture
def model() -> Any:
    return adapted(llama())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_fresh_adapter_changes_no_bit(dtype: torch.dtype, attention: str) -> None:
    model = llama(attn_implementation=attention).to(dtype)
    before = model(X).logits
    llama_adapter.inject(model, layers=3, prompt_length=4)
    assert torch.equal(bits(model(X).logits), bits(before))
    opened(model)
    assert not torch.equal(model(X).logits, before)


def test_the_formula_of_the_paper_in_float64(model: Any) -> None:
    model.double()
    assert torch.allclose(model(X).logits, published(model, X), atol=1e-5, rtol=0)
    assert (without(model, X) - published(model, X)).abs().max() > 0.1
    lora.remove(model)
    assert torch.allclose(model(X).logits, published(model, X), atol=1e-5, rtol=0)


def test_gradients_are_those_of_the_formula_and_reach_nothing_else(model: Any) -> None:
    names = [f"model.layers.{i}.self_attn.lora.default.{p}" for i in (1, 2) for p in ("prompts", "gate")]
    assert trainable(model) == names
    weights = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(published(model, X).pow(2).sum(), weights)
    model(X).logits.double().pow(2).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {*names}
    for parameter, gradient in zip(weights, wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max())


def test_the_gates_learn_first_and_then_the_prompts() -> None:
    model = llama_adapter.inject(llama(), layers=2)
    model(X, labels=X).loss.backward()
    assert all(part.gate.grad.abs().sum() > 0 and part.prompts.grad.abs().sum() == 0 for part in parts(model))
    opened(model)
    model(X, labels=X).loss.backward()
    assert all(part.prompts.grad.abs().sum() > 0 for part in parts(model))


def test_the_verbs_choose_what_acts(model: Any) -> None:
    one = model(X).logits
    adapted(model, seed=2, name="two", prompt_length=3, layers=3)
    two = model(X).logits
    lora.activate(model, "default")
    assert torch.equal(model(X).logits, one)
    lora.activate(model, ["default", "two"])
    both = model(X).logits
    assert not torch.equal(both, one) and not torch.equal(both, two)
    lora.activate(model, None)
    bare = model(X).logits
    assert type(model.model.layers[2].self_attn).__name__ == "LlamaAttention"
    lora.activate(model, "two")
    assert torch.equal(model(X).logits, two) and torch.equal(without(model, X), bare)
    lora.remove(model, "two")
    lora.activate(model, "default")
    assert torch.equal(model(X).logits, one)
    fresh = llama()
    lora.remove(model)
    assert torch.equal(model(X).logits, fresh(X).logits) and [*model.state_dict()] == [*fresh.state_dict()]
    assert all(p.requires_grad for p in model.parameters())


def test_several_that_act_add_their_parts() -> None:
    """With one layer there is nothing after the sum that is not linear but the head's norm, so it is seen in o_proj."""
    model = adapted(adapted(llama(), name="a", layers=1), seed=2, name="b", layers=1)
    outputs: dict[str, torch.Tensor] = {}
    attention = model.model.layers[2].self_attn

    def seen(names: Any) -> torch.Tensor:
        hook = attention.o_proj.register_forward_pre_hook(lambda m, args: outputs.update(x=args[0]))
        lora.activate(model, names)
        model(X)
        hook.remove()
        return outputs["x"]

    bare = seen(None)
    wanted = seen("a") + seen("b") - bare
    assert torch.allclose(seen(["a", "b"]), wanted, atol=1e-5)


def test_copies_and_pickles_compute_the_same(model: Any) -> None:
    wanted = model(X).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X).logits, wanted)
        opened(twin, seed=5)
        assert not torch.equal(twin(X).logits, wanted) and torch.equal(model(X).logits, wanted)


def test_the_config_that_a_host_shows_is_the_models_in_all_but_one_name(model: Any) -> None:
    seen, real = model.model.layers[2].self_attn.config, model.config
    assert seen.hidden_size == real.hidden_size and seen._attn_implementation != real._attn_implementation
    assert copy.deepcopy(seen).head_dim == real.head_dim
    lora.activate(model, None)
    assert model.model.layers[2].self_attn.config is real


def test_a_state_dict_goes_from_one_model_to_another(model: Any) -> None:
    other = llama_adapter.inject(llama(), layers=2, prompt_length=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X).logits, model(X).logits)


def test_the_model_may_change_who_computes_its_attention(model: Any) -> None:
    wanted = model(X).logits
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert torch.allclose(model(X).logits, wanted, atol=1e-5)
        assert model.config._attn_implementation == name
        assert f"{name} + prompts" in str(lora.summary(model))


def test_merge_is_refused_with_the_reason(model: Any) -> None:
    with pytest.raises(LoraError, match="no change of a weight, so they cannot be merged"):
        lora.merge(model)


def test_counts_of_the_published_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # LLaMA-7B's shape
        llama_adapter.inject(model, layers=30, prompt_length=10)
    counts = [sum(getattr(part, name).numel() for part in parts(model)) for name in ("prompts", "gate")]
    assert counts == [1_228_800, 960] and lora.summary(model).trainable == 1_229_760
    assert [name for name in trainable(model) if ".layers.1." in name] == []


def test_wrong_settings_are_named_and_change_nothing() -> None:
    model = llama()
    before = model(X).logits
    for settings, words in (
        ({"layers": 4}, "layers: got 4; LlamaForCausalLM has 3 attentions"),
        ({"layers": 0}, "layers: got 0; a whole number of at least 1"),
        ({"layers": 2, "prompt_length": 0}, "prompt_length: got 0"),
        ({"gate": "x"}, "gate: got 'x'; 'head' or 'layer'"),
        ({"name": "a/b"}, "name: got 'a/b'"),
        ({"train": "lm_head"}, "train: got 'lm_head'; a list of module names"),
        ({"train": 5, "features": 3}, "train: got 5; a list.*\\n.*features: got 3; .tokens, dim."),
        ({"train_norms": "no"}, "train_norms: got 'no'; True or False"),
    ):
        with pytest.raises(LoraError, match=words):
            llama_adapter.inject(model, **settings)
    assert torch.equal(model(X).logits, before) and len(trainable(model)) == len([*model.parameters()])
    llama_adapter.inject(model)
    assert len(parts(model)) == 3
    with pytest.raises(LoraError, match="already has an adapter 'default'"):
        llama_adapter.inject(model)


def test_an_inject_that_fails_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora import injection

    model = adapted(llama(), name="first")
    wanted, before = model(X).logits, {name: type(module) for name, module in model.named_modules()}
    attach, left = injection.attach, iter(range(2))

    def fails(*arguments: Any) -> None:
        attach(*arguments)
        if next(left) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(injection, "attach", fails)
    with pytest.raises(KeyboardInterrupt):
        llama_adapter.inject(model, layers=3)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(model(X).logits, wanted)


def test_prompts_where_the_base_has_no_values_are_told_of() -> None:
    from accelerate import cpu_offload

    wanted = adapted(llama())(X).logits
    first = llama()
    cpu_offload(first, execution_device=torch.device("cpu"))
    assert torch.allclose(adapted(first)(X).logits, wanted, atol=1e-5)
    later = adapted(llama())
    cpu_offload(later, execution_device=torch.device("cpu"))
    with pytest.raises(LoraError, match="prompts are on the meta device"):
        later(X)


def test_a_head_that_nobody_trains_is_named(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    llama().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    with pytest.warns(LoraWarning, match=r"score of .* hold fresh values.*train=\['score'\]"):
        llama_adapter.inject(model)
    lora.remove(model)
    llama_adapter.inject(model, train=["score"])
    assert "score.lora.default.module.weight" in trainable(model)


def test_a_model_without_the_interface_is_refused_by_name() -> None:
    with pytest.raises(LoraError, match="no module of Sequential looks up its attention"):
        llama_adapter.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with pytest.raises(LoraError, match="TransformerEncoder"):
        llama_adapter.inject(torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, batch_first=True), 1))


def test_a_condition_adds_to_the_prompts_of_each_row(model: Any) -> None:
    """The door: what is added to the prompts of a batch, (batch, 1 or K, hidden)."""
    wanted = []
    for row, shift in enumerate((0.0, 1.0)):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for part in parts(twin):
                part.prompts += shift
        wanted.append(twin(X).logits[row])
    for added in (
        torch.tensor([0.0, 1.0])[:, None, None].expand(2, 1, 32),
        torch.tensor([0.0, 1.0])[:, None, None].expand(2, 5, 32),
    ):
        for part in parts(model):
            assert isinstance(part, Prompts)
            part.reads, part.condition = True, SimpleNamespace(tokens=lambda batch, made=added: made)
        assert torch.allclose(model(X).logits, torch.stack(wanted), atol=1e-5)
