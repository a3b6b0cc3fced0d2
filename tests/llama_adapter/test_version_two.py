"""What LLaMA-Adapter V2 trains beside prompts (arXiv:2304.15010): norms, and a scale and a bias for each linear."""

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
from lora.layers.linear import _shifted
from lora.llama_adapter import condition
from small_adapter import CONFIG, TENSORS
from tiny_decoders import X, bits, llama

LINEARS = 3 * 7


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits(one), bits(other))


def moved(model: Any) -> Any:
    """The same model, every trained parameter elsewhere."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def second(model: Any = None, **settings: Any) -> Any:
    model = llama() if model is None else model
    torch.manual_seed(1)
    return llama_adapter.inject(
        model, **{"layers": 2, "prompt_length": 5, "train_norms": True, "train_bias": True, **settings}
    )


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_one_is_the_base_to_the_bit(changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = llama(**changes).to(dtype)
    before, state = model(X).logits, {n: p.clone() for n, p in model.named_parameters()}
    second(model)
    assert same(model(X).logits, before)
    moved(model)
    assert not torch.allclose(model(X).logits, before, atol=1e-2)
    with lora.disabled(model):
        assert same(model(X).logits, before)
    lora.remove(model)
    assert same(model(X).logits, before)
    assert (
        all(same(p, state[n]) for n, p in model.named_parameters())
        and state.keys() == dict(model.named_parameters()).keys()
    )


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_is_scaled_and_shifted(bias: bool) -> None:
    """y = s (W x + b0 + b), in each linear but the head."""
    model = second(llama(attention_bias=bias, mlp_bias=bias), train_norms=False)
    assert len([p for n, p in moved(model).named_parameters() if n.endswith("scale")]) == LINEARS
    host = model.model.layers[1].mlp.down_proj
    if bias:
        host.bias.data.normal_()
    part = host.lora["default"]
    x = torch.randn(4, host.in_features)
    wanted = part.scale * (torch.nn.functional.linear(x, host.weight, host.bias) + part.added)
    assert torch.allclose(host(x), wanted, atol=1e-5)
    gradient = torch.autograd.grad(host(x).square().sum(), [part.scale, part.added])
    expected = torch.autograd.grad(wanted.square().sum(), [part.scale, part.added])
    assert all(torch.allclose(g, e, rtol=1e-3, atol=1e-3) for g, e in zip(gradient, expected, strict=True))


def test_a_fresh_shift_keeps_a_negative_zero() -> None:
    model = second(llama(attention_bias=True))
    host, zeros = model.model.layers[0].self_attn.q_proj, torch.full((2, 32), -0.0)
    for bias in (1.0, -1.0):
        host.bias.data.fill_(bias)
        assert same(_shifted(zeros, host, host.lora), zeros)


def test_what_trains() -> None:
    model = second()
    found = {n for n, p in model.named_parameters() if p.requires_grad}
    kinds = {"prompts": 2, "gate": 2, "scale": LINEARS, "added": LINEARS, "weight": 3 * 2 + 1}
    assert {end: sum(n.endswith(f".{end}") for n in found) for end in kinds} == kinds
    assert len(found) == sum(kinds.values())
    moved(model)(X, labels=X).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    text = str(lora.summary(model))
    assert "scale, bias" in text and "own copy" in text


@pytest.mark.parametrize(
    "settings", [{}, {"train_norms": False}, {"train_bias": False}, {"features": (3, 8), "fusion": "early"}]
)
def test_a_save_comes_back_to_the_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = moved(second(**settings))
    features = torch.randn(2, 3, 8)

    def logits(of: Any) -> Tensor:
        if "features" not in settings:
            return of(X).logits
        with condition(of, features):
            return of(X).logits

    lora.save(model, tmp_path)
    other = lora.load(llama(), tmp_path, trainable=True)
    assert same(logits(other), logits(model))
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, other)]
    assert trained[0] == trained[1]
    assert json.loads((tmp_path / CONFIG).read_text()).get("lora_train_bias", False) == settings.get("train_bias", True)
    assert ("a scale and a bias" in str(describe(tmp_path))) == settings.get("train_bias", True)
    lora.save(other, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / TENSORS).read_bytes()
    assert same(logits(copy.deepcopy(other)), logits(model))


def test_beside_low_rank_adapters_on_the_same_linears() -> None:
    """Changes of a linear add, so two that act have the sum of what each changes."""
    model = moved(second(train_norms=False))
    lora.inject(model, r=2, targets="all-linear", name="low")
    moved(model)
    host = model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, host.in_features)
    outputs = {}
    for names in ((), ("default",), ("low",), ("default", "low")):
        lora.activate(model, list(names) or None)
        outputs[names] = host(x).detach()
    s, low = host.lora["default"].scale, host.lora["low"]
    update = x @ low.A.T @ low.B.T * low.scaling
    assert torch.allclose(outputs["low",], outputs[()] + update, atol=1e-5)
    assert torch.allclose(outputs["default", "low"], outputs["default",] + update, atol=1e-4), s
    lora.activate(model, "low")
    lora.merge(model)
    lora.unmerge(model)


def test_norms_that_another_adapter_trains_are_norms() -> None:
    model = lora.inject(llama(), r=2, targets=["q_proj"], train=["input_layernorm"], name="low")
    second(model, name="one")
    moved(model)
    one = model(X).logits
    second(model, name="two", train_bias=False)
    with lora.disabled(model):
        before = model(X).logits
    assert same(model(X).logits, before)
    norms = {
        n.partition(".lora.")[0] for n, p in model.named_parameters() if ".lora.two." in n and n.endswith("weight")
    }
    assert norms == {n for n, _ in llama().named_modules() if n.endswith("norm")}
    lora.activate(model, "one")
    assert same(model(X).logits, one)


def test_refused() -> None:
    model = second()
    with pytest.raises(LoraError, match="cannot be merged|is not merged"):
        lora.merge(model)
    alone = lora.inject(llama(), update="affine", targets=["q_proj"])
    with pytest.raises(LoraError, match="adds to the bias of .*q_proj.* beside a scale, which is not merged"):
        lora.merge(alone)
    with pytest.raises(LoraError, match="trains more than prompts"), llama_adapter.rows(model, ["default", None]):
        pass
    with pytest.raises(LoraError, match="train_bias: got 'yes'"):
        llama_adapter.inject(llama(), train_bias="yes")
