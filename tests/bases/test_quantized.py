"""Quantized bases (bitsandbytes on the CPU): what an adapted model computes, forward and backward."""

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize, same_bits, snapshot
from lora.layers import adapters_of, hosts
from lora.ops.philox import inverse_keep, keep_mask
from quantized_base import (
    KINDS,
    TARGETS,
    adapted_twin,
    bnb,
    classes,
    distance,
    gradients,
    inputs,
    linear,
    llama,
    net,
    tokens,
    values,
)

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_fresh_adapter_changes_no_bit_and_remove_leaves_no_trace(kind: str, dtype: torch.dtype) -> None:
    model = llama(kind, dtype)
    logits, state, before = model(tokens()).logits, snapshot(model), classes(model)
    flags, quantizer = [p.requires_grad for p in model.parameters()], type(model.hf_quantizer)
    lora.inject(model, r=4, targets=TARGETS)
    assert torch.equal(model(tokens()).logits, logits)
    layer = model.model.layers[0]
    own = before["model.layers.0.mlp.up_proj"].__name__
    assert type(layer.mlp.up_proj).__name__ == f"FrozenLinear[{own}]"
    assert type(layer.mlp.down_proj).__name__ == f"LoraLinear[{own}]"
    assert isinstance(layer.mlp.up_proj, before["model.layers.0.mlp.up_proj"])
    lora.remove(model)
    assert classes(model) == before
    assert same_bits(snapshot(model), state)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert type(model.hf_quantizer) is quantizer


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_autocast_decides_what_a_quantized_linear_computes_in(kind: str) -> None:
    """Trainer(bf16=True) over transformers' default, which is to compute in float32."""
    model = llama(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens()).logits
        lora.inject(model, r=4, targets=TARGETS)
        assert torch.equal(model(tokens()).logits, logits)
        found = gradients(randomize(model), model(tokens()).logits)
    twin = adapted_twin(model, torch.float32, r=4, targets=TARGETS)
    exact = gradients(twin, twin(tokens()).logits)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(twin, twin(tokens()).logits)
    assert distance(found, exact) <= 2 * distance(plain, exact)


def test_int8_in_eval_mode_without_gradients_is_bitsandbytes_own_product() -> None:
    model = llama("int8").eval()
    with torch.no_grad():
        logits = model(tokens()).logits
        lora.inject(model, r=4, targets=TARGETS)
        assert torch.equal(model(tokens()).logits, logits)
    assert not torch.equal(model(tokens()).logits, logits)  # with gradients: the weights alone are quantized
    small = net("int8", torch.float32)
    part = adapters_of(randomize(lora.inject(small, r=4, targets=["0"]))[0])["default"]
    with torch.no_grad():
        base = bnb.nn.Linear8bitLt.forward(small.eval()[0], x := inputs(torch.float32))
        assert torch.equal(small[0](x), base.addmm(x @ part.A.t(), part.B.t(), alpha=part.scaling))


def test_int8_in_eval_mode_keeps_its_outliers() -> None:
    """A column over the threshold of 6 is multiplied in 16 bits by bitsandbytes' own forward."""
    model, x = net("int8", torch.float32)[:1].eval(), inputs(torch.float32)
    x[..., 3] *= 20
    twin = copy.deepcopy(model)
    with torch.no_grad():
        want = twin(x)
        twin[0].state.threshold = 0.0
        assert not torch.equal(twin(x), want)
        lora.inject(model, r=4, targets=["0"])
        assert torch.equal(model(x), want)


def test_int8_in_eval_mode_has_the_trained_bias_and_leaves_the_bases_in_its_dtype() -> None:
    model = net("int8", torch.float32)[:1].eval()
    x = inputs()
    with torch.no_grad():
        out, base = copy.deepcopy(model)(x), snapshot(model)  # bitsandbytes casts the bias to x's dtype in place
        lora.inject(model, r=4, targets=["0"], bias="lora_only")
        assert torch.equal(model(x), out)
        adapters_of(model[0])["default"].bias.add_(1)
        assert torch.allclose(model(x), out + 1, atol=0.02)
    lora.remove(model)
    assert same_bits(snapshot(model), base)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_four_bits_in_eval_mode_are_not_repacked(kind: str) -> None:
    model = randomize(lora.inject(net(kind), r=4, targets=["0"], bias="all"))  # its other linears train their bias
    state, out = snapshot(model), model(inputs())
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs()), out)
        lora.activate(model, None)
        model(inputs())
    assert same_bits(snapshot(model), state)


def test_a_weight_that_bitsandbytes_has_repacked_is_refused() -> None:
    model = net("nf4")
    model[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(lora.LoraError, match="repacked a 4-bit weight .* load the model again"):
        lora.inject(model, r=4, targets=["0"])
    assert adapters_of(model[0]) is None


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "alpha": 8},
    "rslora": {"r": 4, "alpha": 8, "rslora": True},
    "target's bias": {"r": 4, "alpha": 8, "bias": "lora_only"},
    "every bias": {"r": 4, "alpha": 8, "bias": "all"},
}


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_outputs_and_gradients_against_float64_on_the_dequantized_weights(
    kind: str, dtype: torch.dtype, setting: str
) -> None:
    """Within twice the error of plain torch on the dequantized weights: no activation is quantized."""
    settings = {**SETTINGS[setting], "targets": ["0", "4"]}  # linear 2 carries none
    model = randomize(lora.inject(net(kind, dtype), **settings))
    exact_twin, plain_twin = (adapted_twin(model, d, **settings) for d in (torch.float64, dtype))
    found: list[dict[str, Tensor]] = []
    for each, own in ((model, dtype), (plain_twin, dtype), (exact_twin, torch.float64)):
        x = inputs(dtype).to(own).requires_grad_()
        out = each(x)
        assert out.dtype == own
        found.append({**gradients(each, out), "x": x.grad, "out": out.detach()})
    ours, plain, exact = found
    assert len(ours) == {"plain": 6, "rslora": 6, "target's bias": 8, "every bias": 9}[setting]
    for group in ({"out"}, {"x"}, ours.keys() - {"out", "x"}):
        mine, theirs, truth = ({n: f[n] for n in group} for f in (ours, plain, exact))
        assert distance(mine, truth) <= 2 * distance(theirs, truth)


@kinds
def test_dropout_masks_the_update_alone_forward_and_backward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(lora.inject(net(kind, torch.float32)[:1], r=4, alpha=8, targets=["0"], dropout=0.3)).train()
    seed, part, x = torch.tensor([77]), adapters_of(model[0])["default"], inputs(torch.float32).requires_grad_()
    monkeypatch.setattr("lora.ops.operator.draw_seed", lambda device: seed)
    found = {**gradients(model, out := model(x)), "x": x.grad, "out": out.detach()}
    A, B, z = (t.detach().double().requires_grad_() for t in (part.A, part.B, x))
    dropped = z * keep_mask(seed, 9, 64, 0.3) * inverse_keep(0.3)
    exact = z @ values(model[0]).double().t() + model[0].bias.double() + 2 * dropped @ A.t() @ B.t()
    (exact * torch.randn(exact.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    names = "0.lora.default.A", "0.lora.default.B", "x", "out"
    truth = dict(zip(names, (A.grad, B.grad, z.grad, exact.detach()), strict=True))
    for name in names:
        assert distance({name: found[name]}, {name: truth[name]}) < 1e-6, name
    assert not torch.equal(model.eval()(x), out)


@kinds
def test_active_adapters_with_different_dropout(kind: str) -> None:
    model = net(kind, torch.float32)[:1]
    lora.inject(model, r=4, targets=["0"], bias="lora_only")
    lora.inject(model, r=2, targets=["0"], bias="lora_only", dropout=0.4, name="other")
    lora.activate(model, ["default", "other"])
    for parameter in model[0].lora.parameters():
        parameter.requires_grad_()
    randomize(model).train()
    one, other = (adapters_of(model[0])[name] for name in ("default", "other"))
    x = inputs(torch.float32)
    torch.manual_seed(5)
    found = gradients(model, out := model(x))
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.4)
    bias = one.bias + other.bias - model[0].bias
    exact = x @ values(model[0]).t() + bias + one.scaling * x @ one.A.t() @ one.B.t()
    exact = exact + other.scaling * dropped @ other.A.t() @ other.B.t()
    assert distance({"": out.detach()}, {"": exact.detach()}) < 1e-6
    assert distance(found, gradients(model, exact)) < 1e-6
    assert len(found) == 6


@kinds
def test_no_dense_weight_is_saved_for_the_backward_pass(kind: str) -> None:
    model = randomize(lora.inject(net(kind), r=4, targets=["0", "4"]))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = model(inputs(rows=3))
    kept = [t for t in saved if t.is_floating_point() and t.numel() >= 64 * 128]
    assert saved and not kept
    # The linear without an adapter keeps nothing of its input; tanh keeps its output, which is that input, once.
    assert sum(t.shape == (3, 128) for t in saved) == 3
    out.sum().backward()


def pair(kind: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The same model adapted by us and by PEFT, with the same random A and B."""
    mine = randomize(lora.inject(llama(kind, dtype), r=4, alpha=8, targets=TARGETS))
    other = peft.get_peft_model(llama(kind, dtype), peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)).train()
    for name, _, adapters in hosts(mine):
        layer = other.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data = adapters["default"].A.data.clone()
        layer.lora_B["default"].weight.data = adapters["default"].B.data.clone()
    return mine, other


def by_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    head = "base_model.model."
    return {
        n.removeprefix(head)
        .replace(".lora_A.default.weight", ".lora.default.A")
        .replace(".lora_B.default.weight", ".lora.default.B"): t
        for n, t in theirs.items()
    }


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_has_the_same_logits_and_gradients(kind: str, dtype: torch.dtype) -> None:
    """In fp32 the same but for summation; in bf16 our error against float64 is at most twice PEFT's."""
    mine, other = pair(kind, dtype)
    ours = gradients(mine, out := mine(tokens()).logits)
    theirs = by_our_names(gradients(other, their_out := other(tokens()).logits))
    if dtype == torch.float32:
        assert distance({"": out.detach()}, {"": their_out.detach()}) < 1e-5
        assert distance(ours, theirs) < 1e-5
        return
    twin = adapted_twin(mine, torch.float64, r=4, alpha=8, targets=TARGETS)
    exact = gradients(twin, exact_out := twin(tokens()).logits)
    truth = {"": exact_out.detach()}
    assert distance({"": out.detach()}, truth) <= 2 * distance({"": their_out.detach()}, truth)
    assert distance(ours, exact) <= 2 * distance(theirs, exact)


@kinds
def test_copies_and_pickles_give_the_same_logits(kind: str) -> None:
    model = randomize(lora.inject(llama(kind), r=4, targets=TARGETS, bias="all"))
    logits = model(tokens()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens()).logits, logits)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        assert classes(twin) == classes(model)
        assert type(twin.hf_quantizer) is type(model.hf_quantizer)
        lora.remove(twin)
        assert type(twin.hf_quantizer) is type(llama(kind).hf_quantizer)
    assert torch.equal(model(tokens()).logits, logits)


@kinds
def test_state_dict_round_trip(kind: str) -> None:
    model = randomize(lora.inject(llama(kind), r=4, targets=TARGETS))
    other = lora.inject(llama(kind), r=4, targets=TARGETS)
    result = other.load_state_dict(snapshot(model), strict=kind == "int8")  # Linear4bit does not know its own keys
    assert not result.missing_keys
    assert all(".weight." in key for key in result.unexpected_keys)
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compiled_code_stays_valid_when_other_models_are_adapted(kind: str) -> None:
    """So nothing that it reads may grow, such as a cache by class or by shape."""
    torch._dynamo.reset()
    model = lora.inject(net(kind), r=2, targets=["0"])
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = inputs()
    compiled(x)
    compiled(x)
    once = counter.frame_count
    other = nn.Sequential(linear(kind, 192, 64), type("Fresh", (nn.Linear,), {})(64, 64)).to(torch.bfloat16).to("cpu")
    lora.inject(other, r=2, targets=["1"])
    other(torch.ones(1, 192, dtype=torch.bfloat16))
    compiled(x)
    assert once == counter.frame_count == 1


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_bias_of_another_dtype_than_the_products(kind: str) -> None:
    """On a linear without an adapter, beside one that has one."""
    model = lora.inject(net(kind, torch.float32), r=2, targets=["0"])
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    host = model[4]
    if kind != "int8":
        host.compute_dtype = torch.bfloat16
    host.bias.requires_grad_()
    y = host(x)
    y.sum().backward()
    assert host.bias.dtype == torch.float32 and y.dtype == torch.bfloat16
    plain = torch.nn.functional.linear(x, values(host).to(torch.bfloat16), host.bias.to(torch.bfloat16))
    assert torch.equal(y, plain)
    assert torch.equal(host.bias.grad, torch.full((64,), 9.0))


@kinds
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compile_fullgraph(kind: str) -> None:
    model = randomize(lora.inject(net(kind), r=4, targets=["0", "4"]))
    x = inputs()
    found = gradients(model, out := model(x))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    again = gradients(model, result := compiled(x))
    assert torch.equal(out, result)
    assert same_bits(found, again)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_transformers_trainer_trains_the_adapter_alone(kind: str, tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tokens().repeat(4, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=2e-2, per_device_train_batch_size=4,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model = llama(kind)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=arguments, train_dataset=rows)
    lora.inject(model, r=4, targets=TARGETS)
    before = snapshot(model)
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == set(trained_names(model))
    lora.remove(model)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=arguments, train_dataset=rows)


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_any_storage_of_four_bits(storage: torch.dtype) -> None:
    model = llama("nf4", bnb_4bit_quant_storage=storage)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == storage
    logits = model(tokens()).logits
    assert torch.equal(lora.inject(model, r=4, targets=TARGETS)(tokens()).logits, logits)
    assert lora.summary(model).total == lora.summary(lora.inject(llama(None), r=4, targets=TARGETS)).total


def test_a_weight_changed_before_the_backward_pass_is_noticed() -> None:
    model = lora.inject(llama("nf4"), r=4, targets=["q_proj"])
    loss = model(tokens()).logits.float().sum()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    with pytest.raises(lora.LoraError, match="a weight was changed after the forward pass"):
        loss.backward()


def test_a_parameter_that_was_replaced_is_known_by_its_module() -> None:
    """FSDP makes new parameters of the old ones' data."""
    model = lora.inject(llama("nf4"), r=4, targets=["q_proj"])
    want = model(tokens()).logits
    for module in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.up_proj):
        module.weight = nn.Parameter(module.weight.data, requires_grad=False)
    assert torch.equal(model(tokens()).logits, want)
    assert "nf4" in str(lora.summary(model))
    model = lora.inject(llama("int8"), r=4, targets=["q_proj"])
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    with pytest.raises(lora.LoraError, match="has lost its scales .SCB.: something put another parameter in its place"):
        model(tokens())
