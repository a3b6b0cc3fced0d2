"""DoRA on a linear: forward and gradients against the definition in float64, and against PEFT."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora
from conftest import MODELS, same_bits, snapshot, tiny_gpt2, tiny_llama
from dora_oracle import error, fill, leaves64, matrix64, together64
from lora.layers import adapters_of, hosts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def net(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layer: nn.Module = Conv1D(63, 96) if kind == "conv1d" else nn.Linear(96, 63, bias)
    if kind == "conv1d":
        nn.init.normal_(layer.bias, std=0.5)
    return nn.Sequential(layer).to(dtype)


def plain(x: Tensor, W: Tensor, bias: Tensor | None, part: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition in plain torch, each step in x's dtype."""
    own = {name: p.detach().clone().requires_grad_() for name, p in part.named_parameters()}
    A, B = own["A"].to(x.dtype), own["B"].to(x.dtype)
    norm = (W + part.scaling * B @ A).detach().norm(dim=1)
    z = x @ W.t() + part.scaling * (x @ A.t()) @ B.t()
    y = z * (own["magnitude"].to(x.dtype) / norm)
    bias = own["bias"].to(x.dtype) if "bias" in own else bias
    return (y if bias is None else y + bias), own


@pytest.mark.parametrize("trained_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_forward_and_gradients_are_within_twice_plain_torchs_error(
    kind: str, dtype: torch.dtype, trained_bias: bool
) -> None:
    model = net(kind, dtype)
    fill(lora.inject(model, targets=["0"], r=5, dora=True, bias="lora_only" if trained_bias else "none"))
    host, part = model[0], adapters_of(model[0])["default"]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 37, 96, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(3, 37, 63, generator=generator).to(dtype)

    x64, own64 = x.detach().double().requires_grad_(), leaves64(part)
    bias64 = own64["bias"] if trained_bias else host.bias.detach().double()
    y64 = x64 @ together64(host, leaves={"default": own64}).t() + bias64
    y64.backward(dy.double())
    exact = {"y": y64.detach(), "x": x64.grad} | {name: leaf.grad for name, leaf in own64.items()}

    x_plain = x.detach().clone().requires_grad_()
    y_plain, own = plain(x_plain, matrix64(host).to(dtype), host.bias.detach(), part)
    y_plain.backward(dy)
    theirs = {"y": y_plain.detach(), "x": x_plain.grad} | {name: leaf.grad for name, leaf in own.items()}

    y = model(x)
    assert y.dtype == dtype
    y.backward(dy)
    ours = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in part.named_parameters()}
    assert ours.keys() == exact.keys() == theirs.keys() and "magnitude" in ours
    for name, truth in exact.items():
        assert error(ours[name], truth) <= 2 * error(theirs[name], truth) + 1e-7, name


def test_the_gradient_of_the_magnitude_lives_beside_a_bias_that_is_far_larger() -> None:
    model = net("linear")
    fill(lora.inject(model, targets=["0"], r=5, dora=True))
    host, part = model[0], adapters_of(model[0])["default"]
    host.bias.data.fill_(30.0)
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    own = leaves64(part)
    (x.double() @ together64(host, leaves={"default": own}).t()).pow(2).sum().backward()
    (model(x).double() - 30).pow(2).sum().backward()
    assert error(part.magnitude.grad, own["magnitude"].grad) < 1e-4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_fresh_adapter_changes_no_bit(kind: str, dtype: torch.dtype, bias: bool) -> None:
    model = net(kind, dtype, bias)
    x = torch.randn(200, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    want, before = model(x), snapshot(model)
    lora.inject(model, targets=["0"], dora=True, bias="lora_only")
    assert torch.equal(model(x), want)
    lora.inject(model, targets=["0"], dora=True, name="second")
    lora.inject(model, targets=["0"], name="plain")
    lora.activate(model, ["default", "second", "plain"])
    assert torch.equal(model(x), want)
    lora.merge(model)
    assert same_bits({k: v for k, v in snapshot(model).items() if ".lora." not in k}, before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_changes_no_bit_of_a_model(name: str, dtype: torch.dtype, ids: Tensor) -> None:
    model = MODELS[name][0]().to(dtype)
    want = model(ids).logits
    lora.inject(model, targets="all-linear", dora=True, bias="all")
    assert torch.equal(model(ids).logits, want)


def peft_pair(ours: dict[str, Any], theirs: dict[str, Any], architecture: str) -> tuple[nn.Module, nn.Module]:
    """A model adapted by us and by PEFT, with the same values."""
    build, targets = MODELS[architecture]
    base = build()
    mine = fill(lora.inject(copy.deepcopy(base), targets=targets, dora=True, **ours))
    config = peft.LoraConfig(target_modules=targets, use_dora=True, **theirs)
    other = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, _, adapters in hosts(mine):
            if "default" in adapters and hasattr(adapters["default"], "A"):
                layer, part = other.base_model.model.get_submodule(name), adapters["default"]
                layer.lora_A["default"].weight.copy_(part.A)
                layer.lora_B["default"].weight.copy_(part.B)
                layer.lora_magnitude_vector["default"].weight.copy_(part.magnitude)
                if part.bias is not None:
                    layer.base_layer.bias.copy_(part.bias)
            elif "default" in adapters:  # a norm's bias, trained whole
                other.base_model.model.get_submodule(name).bias.copy_(adapters["default"].module.bias)
    return mine, other


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"r": 4, "alpha": 8}, {"r": 4, "lora_alpha": 8}),
    "rslora": ({"r": 4, "alpha": 8, "rslora": True}, {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "biases of targets": ({"r": 2, "alpha": 3, "bias": "lora_only"}, {"r": 2, "lora_alpha": 3, "bias": "lora_only"}),
    "all biases": ({"r": 2, "alpha": 3, "bias": "all"}, {"r": 2, "lora_alpha": 3, "bias": "all"}),
    "one layer": ({"r": 4, "alpha": 8, "layers": [1]}, {"r": 4, "lora_alpha": 8, "layers_to_transform": [1]}),
}


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_logits_and_gradients_are_pefts(architecture: str, setting: str, ids: Tensor) -> None:
    mine, other = peft_pair(*SETTINGS[setting], architecture)
    got, want = mine(ids).logits, other(ids).logits
    assert error(got, want) < 2e-6
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(0))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    compared = 0
    for name, _, adapters in hosts(mine):
        part, layer = adapters["default"], other.base_model.model.get_submodule(name)
        if not hasattr(part, "A"):
            continue
        for p, q in (
            (part.A, layer.lora_A["default"].weight),
            (part.B, layer.lora_B["default"].weight),
            (part.magnitude, layer.lora_magnitude_vector["default"].weight),
            *([] if part.bias is None else [(part.bias, layer.base_layer.bias)]),
        ):
            assert error(p.grad, q.grad) < 2e-5, name
            compared += 1
    assert compared >= 6


def test_rank_and_alpha_patterns_are_pefts(ids: Tensor) -> None:
    patterns = {"rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 7}, "alpha_pattern": {"down_proj": 5}}
    mine, other = peft_pair({"r": 4, "alpha": 8, **patterns}, {"r": 4, "lora_alpha": 8, **patterns}, "llama")
    assert {adapters["default"].r for _, _, adapters in hosts(mine)} == {2, 4, 7}
    assert error(mine(ids).logits, other(ids).logits) < 2e-6


def test_dropout_falls_on_the_updates_input_alone() -> None:
    model = net("linear")
    fill(lora.inject(model, targets=["0"], r=5, dora=True, dropout=0.4)).train()
    host, part = model[0], adapters_of(model[0])["default"]
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    got = model(x)
    torch.manual_seed(5)
    assert torch.equal(model(x), got)
    assert not torch.equal(model(x), got)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.4).double()
    W, own = matrix64(host), leaves64(part)
    V = W + part.scaling * own["B"] @ own["A"]
    z = x.double() @ W.t() + part.scaling * dropped @ own["A"].t() @ own["B"].t()
    exact = z * own["magnitude"] / V.norm(dim=1) + host.bias.double()
    assert error(got, exact.detach()) < 1e-6
    assert error(model.eval()(x), (x.double() @ together64(host).t() + host.bias.double()).detach()) < 1e-6


def test_a_row_of_zeros_stays_zero_until_its_update_moves() -> None:
    model = net("linear")
    model[0].weight.data[7] = 0
    fill(lora.inject(model, targets=["0"], r=5, dora=True), stretch=0.0, std=0.0)
    part, x = adapters_of(model[0])["default"], torch.randn(20, 96)
    y = model(x)
    y.pow(2).sum().backward()
    assert torch.equal(y[:, 7], model[0].bias[7].expand(20))
    assert all(p.grad.isfinite().all() for p in part.parameters())
    part.B.data[7] = 0.5
    part.magnitude.data[7] = 2.0
    assert error(model(x), (x.double() @ together64(model[0]).t() + model[0].bias.double()).detach()) < 1e-6


def test_a_model_in_double_precision_keeps_what_it_computed() -> None:
    model = tiny_llama()
    fill(lora.inject(model, targets="all-linear", dora=True), std=0.05)
    ids = torch.arange(1, 12)[None]
    want = model(ids).logits
    assert error(copy.deepcopy(model).double()(ids).logits, want.double()) < 1e-5


def test_the_magnitude_of_conv1d_has_a_number_for_each_output() -> None:
    model = lora.inject(tiny_gpt2(), targets=["c_attn"], dora=True)
    host = model.transformer.h[0].attn.c_attn
    magnitude = adapters_of(host)["default"].magnitude
    assert magnitude.shape == (144,) and magnitude.dtype == torch.float32 and magnitude.requires_grad
    torch.testing.assert_close(magnitude.double(), matrix64(host).norm(dim=1), rtol=1e-6, atol=0)


def test_the_scale_over_int8_does_not_depend_on_the_calls_before() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)).to("cpu")
    lora.inject(model, r=4, targets=["0"], dora=True)
    model.train()
    adapters = adapters_of(model[0])
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        model(torch.randn(3, 64, dtype=dtype))
        assert torch.equal(adapters["default"].output_scale(adapters.frozen), torch.ones(32))
