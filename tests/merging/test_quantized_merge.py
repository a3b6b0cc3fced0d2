"""Quantized bases: merge into 16 bits or quantize again, the way back to the byte, and files between bases."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize, same_bits, snapshot, state_of, tiny_gpt2, unchanged
from lora.files.adapter import read
from lora.files.header import CHECKSUM
from lora.layers import adapters_of, hosts
from quantized_base import (
    KINDS,
    TARGETS,
    adapted,
    bnb,
    classes,
    dense_twin,
    distance,
    inputs,
    linear,
    llama,
    net,
    scaled,
    tokens,
    values,
)
from two_kinds import merge, update64

kinds = pytest.mark.parametrize("kind", KINDS)


def sums(model: nn.Module) -> dict[str, Tensor]:
    """W0 + D in fp32, D summed in float64."""
    return {name: values(host) + update64(host).float() for name, host, _ in hosts(model)}


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_merge_gives_plain_linears_of_the_sum_rounded_once(kind: str, dtype: torch.dtype) -> None:
    model = adapted(kind, dtype)
    wanted, logits = sums(model), model(tokens()).logits
    report = merge(model)
    for name, exact in wanted.items():
        host = model.get_submodule(name)
        assert type(host) is nn.Linear and host.weight.dtype == dtype
        assert not host.weight.requires_grad and not isinstance(host.weight, bnb.nn.Params4bit | bnb.nn.Int8Params)
        assert torch.equal(host.weight, exact.to(dtype))
    assert {m.stored for m in report.modules} == {str(dtype)[6:]}
    assert distance({"": model(tokens()).logits}, {"": logits}) < (0.05 if dtype == torch.bfloat16 else 1e-5)
    assert {row.runs for row in lora.summary(model).rows} == {"merged"}


@kinds
@pytest.mark.parametrize("into", ["16 bits", "itself"])
def test_unmerge_gives_back_the_same_bytes_and_objects_20_times(kind: str, into: str) -> None:
    model = adapted(kind, ratio=1.0)
    if kind == "int8":  # its first eval pass moves the scales from the parameter to the module
        with torch.no_grad():
            model.eval()(tokens())
        model.train()
    before, state, logits = snapshot(model), state_of(model), model(tokens()).logits
    target = None if into == "16 bits" else kind[-4:].strip()
    merge(model, into=target)
    merged, once = snapshot(model), model(tokens()).logits
    assert not torch.equal(once, logits)
    for _ in range(20):
        lora.unmerge(model)
        assert state_of(model) == state
        assert same_bits(snapshot(model), before)
        merge(model, into=target)
        assert same_bits(snapshot(model), merged)
    assert torch.equal(model(tokens()).logits, once)
    with torch.no_grad():
        model.eval()(tokens())
    lora.unmerge(model)
    assert same_bits(snapshot(model), before) and state_of(model) == state
    assert torch.equal(model.train()(tokens()).logits, logits)


@kinds
@pytest.mark.parametrize("into", ["16 bits", "itself"])
def test_disabled_and_save_of_a_merged_model(kind: str, into: str, tmp_path: Path) -> None:
    model = adapted(kind, ratio=1.0)
    lora.save(model, tmp_path / "before")
    base = llama(kind)(tokens()).logits
    merge(model, into=None if into == "16 bits" else kind[-4:].strip())
    merged, kept = snapshot(model), classes(model)
    with lora.disabled(model):
        assert torch.equal(model(tokens()).logits, base)
        assert isinstance(model.model.layers[0].self_attn.q_proj, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    assert same_bits(snapshot(model), merged) and classes(model) == kept
    lora.save(model, tmp_path / "after")
    assert same_bits(snapshot(model), merged) and classes(model) == kept
    before, after = (read(tmp_path / when) for when in ("before", "after"))
    assert same_bits(before.tensors(), after.tensors())
    assert {**before.metadata, CHECKSUM: ""} == {
        **after.metadata,
        CHECKSUM: "",
    }  # which is of the file, with keys in any order
    lora.remove(model)
    assert torch.equal(model(tokens()).logits, base)


@kinds
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_merged_too(kind: str, bias: str) -> None:
    model = net(kind)
    lora.inject(model, r=4, targets=["0"], bias=bias)
    randomize(model)
    before, out = snapshot(model), model(inputs())
    for mode in (True, False):
        merge(model.train(mode))
        with torch.no_grad():
            assert distance({"": model(inputs())}, {"": out}) < 0.02
        lora.unmerge(model)
        assert same_bits(snapshot(model), before)
    assert torch.equal(model.train()(inputs()), out)


@kinds
def test_into_a_code_that_loses_the_update_is_refused_without_force(kind: str) -> None:
    model, into = adapted(kind, ratio=0.001), kind[-4:].strip()
    with unchanged(model), pytest.raises(lora.LoraError, match=rf"less than 50% would survive in {into}.*force=True"):
        lora.merge(model, into=into)
    before, wanted = snapshot(model), sums(model)
    with pytest.warns(lora.LoraWarning, match=f"kept less than 99% of their update in {into}.*into=None"):
        report = lora.merge(model, into=into, force=True)
    assert {m.stored for m in report.modules} == {into} and into in str(report)
    assert min(m.survived for m in report.modules) < 0.5
    for name, exact in wanted.items():
        again = linear(kind, exact.shape[1], exact.shape[0], bias=False)
        again.weight.data = exact
        assert torch.equal(values(model.get_submodule(name)), values(again.to("cpu")))
    lora.unmerge(model)
    assert same_bits(snapshot(model), before)


@kinds
def test_into_a_code_that_holds_the_update_needs_no_force(kind: str) -> None:
    model, into = adapted(kind, ratio=1.0), kind[-4:].strip()
    weights = {name: values(host) for name, host, _ in hosts(model)}
    updates = {name: update64(host) for name, host, _ in hosts(model)}
    report = merge(model, into=into)
    for module in report.modules:
        change, exact = (values(model.get_submodule(module.name)) - weights[module.name]).double(), updates[module.name]
        assert module.kept == pytest.approx(((change * exact).sum() / exact.square().sum()).item(), abs=1e-5)
        assert module.noise == pytest.approx(((change - exact).norm() / exact.norm()).item(), abs=1e-5)
        cosine = torch.nn.functional.cosine_similarity(change.flatten(), exact.flatten(), 0).item()
        assert module.survived == pytest.approx(min(module.kept, cosine), abs=1e-5) and module.survived > 0.9
    with pytest.raises(lora.LoraError, match="merged already"):
        lora.merge(model, into=into)


@kinds
def test_a_dense_target_beside_quantized_ones_is_merged_as_ever(kind: str) -> None:
    model, into = adapted(kind, ratio=1.0, targets=[*TARGETS, "lm_head"]), kind[-4:].strip()
    before = snapshot(model)
    for target, stored in ((None, {"bfloat16"}), (into, {"bfloat16", into})):
        assert {m.stored for m in merge(model, into=target).modules} == stored
        assert type(model.lm_head) is nn.Linear
        lora.unmerge(model)
        assert same_bits(snapshot(model), before)


@pytest.mark.parametrize(
    ("kind", "into", "message"),
    [
        ("nf4", "nf8", r"got 'nf8'; allowed are None \(a 16-bit layer\), 'nf4', 'fp4', 'int8'"),
        ("nf4", "int8", r"got 'int8', but the weight of .* is nf4; allowed are 'nf4' and None"),
        ("int8", "nf4", r"got 'nf4', but the weight of .* is int8; allowed are 'int8' and None"),
        (None, "nf4", "got 'nf4', but no target is quantized; merge, save, and quantize"),
    ],
)
def test_a_wrong_into_is_refused(kind: str | None, into: str, message: str) -> None:
    model = adapted(kind)
    with unchanged(model), pytest.raises(lora.LoraError, match=message):
        lora.merge(model, into=into)


@pytest.mark.parametrize("into", [None, "nf4"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_within_a_merge_leaves_everything(into: str | None, error: type, monkeypatch) -> None:
    model = adapted("nf4", ratio=1.0)
    step = "bitsandbytes.functional.quantize_4bit" if into else "lora.exact.replaced.nn.Parameter"
    module, _, name = step.rpartition(".")
    real, calls = pytest.importorskip(module).__dict__[name] if into else nn.Parameter, []

    def failing(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error("full")
        return real(*args, **keywords)

    with monkeypatch.context() as patch, unchanged(model):
        patch.setattr(step, failing)
        with pytest.raises(error, match="full"):
            lora.merge(model, into=into)
    assert len(calls) == 2
    merge(model, into=into)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(("value", "message"), [(float("nan"), "has NaN or infinity"), (3e6, "infinity in float16")])
@pytest.mark.parametrize("into", ["16 bits", "itself"])
def test_what_is_not_finite_is_refused(kind: str, value: float, message: str, into: str) -> None:
    model = adapted(kind, torch.float16)
    adapters_of(model.model.layers[1].mlp.down_proj)["default"].B.data[5] = value
    quantize = None if into == "16 bits" else kind
    if value == value and quantize is not None:
        message = "infinity in int8" if kind == "int8" else ""  # 4 bits have an absmax in fp32
    if not message:
        merge(model, into=quantize, force=True)
        return
    with unchanged(model), pytest.raises(lora.LoraError, match=message):
        lora.merge(model, into=quantize, force=True)


@pytest.mark.parametrize("kind", ["nf4", "nested nf4", "int8"])
@pytest.mark.parametrize("targets", [TARGETS, "all-linear"], ids=["some", "all"])
def test_an_unloaded_model_is_saved_and_loaded_as_it_is(kind: str, targets: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted(kind, targets=targets)
    quantized = {name for name, m in model.named_modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))}
    merged = {name for name, _, _ in hosts(model)}
    merge(model, unload=True)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in merged)
    assert not any(".lora" in name for name, _ in model.named_modules())
    assert not any(hasattr(model.get_submodule(name), a) for name in merged for a in ("quant_state", "state"))
    logits = model(tokens()).logits
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    assert torch.equal(again(tokens()).logits, logits)
    assert {k: type(m).__name__ for k, m in again.named_modules()} == {
        k: type(m).__name__ for k, m in model.named_modules()
    }
    if targets == "all-linear":
        assert merged == quantized and "quantization_config" not in saved
        assert not getattr(model, "is_quantized", False) and not hasattr(model, "hf_quantizer")
        model.to(torch.float32)  # which transformers refuses for a quantized model
    else:
        assert merged | {"lm_head"} <= set(saved["quantization_config"]["llm_int8_skip_modules"])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_unload_into_the_code_leaves_a_quantized_model(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted(kind, ratio=1.0)
    kept = classes(llama(kind))
    merge(model, into=kind, unload=True)
    assert classes(model) == kept
    logits = model(tokens()).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    assert classes(again) == kept and torch.equal(again(tokens()).logits, logits)


@pytest.mark.parametrize("into", [False, True], ids=["16 bits", "again"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("what", ["weight", "A"])
def test_what_changed_while_merged_is_not_thrown_away(kind: str, what: str, into: bool, tmp_path: Path) -> None:
    model = adapted(kind, ratio=1.0)
    layer = model.model.layers[0].self_attn.q_proj
    merge(model, into=kind if into else None)
    tensor = layer.weight if what == "weight" else layer.lora["default"].A
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.view(-1)[3] += 1
    for verb in (lora.unmerge, lambda m: lora.save(m, tmp_path)):
        with unchanged(model), pytest.raises(lora.LoraError, match="cannot be unmerged.*changed after the merge"):
            verb(model)
    with torch.no_grad():
        tensor.copy_(before)
    lora.unmerge(model)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_merged_linear_fits_the_activations_and_not_the_norms(kind: str) -> None:
    model = lora.prepare(llama(kind), norms_fp32=True, checkpointing=False)
    lora.inject(model, r=4, targets=["q_proj"])
    want = model(tokens()).logits
    merge(randomize(model, std=1e-4))
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == torch.bfloat16
    assert distance({"": model(tokens()).logits}, {"": want}) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_int8_net_with_norms_alone_is_merged_into_their_dtype(dtype: torch.dtype) -> None:
    module = nn.Sequential(linear("int8", 64, 64, bias=False), nn.LayerNorm(64, dtype=dtype)).to("cpu")
    lora.inject(module, r=4, targets=["0"])
    lora.merge(module)
    assert module(torch.randn(2, 64, dtype=dtype)).dtype == module[0].weight.dtype == dtype


def test_an_int8_net_alone_is_merged_into_what_it_computed_with() -> None:
    module = nn.Sequential(linear("int8", 64, 64, bias=False)).to("cpu")
    lora.inject(module, r=4, targets=["0"])
    module(torch.randn(2, 64))
    lora.merge(module)
    assert module[0].weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_merged_model_that_was_cast_is_unmerged(kind: str) -> None:
    model = lora.inject(net(kind), r=4, targets=["0", "2", "4"])
    before = [p.detach().clone() for p in (model[0].weight, model[4].weight)]
    lora.merge(randomize(model))
    model.to(torch.float32)  # widened: nothing is lost, and nothing to say
    lora.unmerge(model)
    assert all(torch.equal(p, b) for p, b in zip((model[0].weight, model[4].weight), before, strict=True))
    lora.merge(model)
    model.half()
    with pytest.warns(lora.LoraWarning, match="was cast while it was merged.*back to the bit"):
        lora.unmerge(model)
    assert all(torch.equal(p, b) for p, b in zip((model[0].weight, model[4].weight), before, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_scales_that_changed_while_merged_are_noticed(kind: str) -> None:
    model = lora.inject(net(kind), r=4, targets=["0"])
    merge(randomize(model), into=kind, force=True)
    weight = model[0].weight
    (weight.SCB if kind == "int8" else weight.quant_state.absmax).mul_(2)
    with pytest.raises(lora.LoraError, match="cannot be unmerged"):
        lora.unmerge(model)


def test_a_bias_of_another_dtype_is_merged_into_the_linears_and_comes_back() -> None:
    module = nn.Sequential(nn.Embedding(9, 64, dtype=torch.bfloat16), linear("nf4", 64, 128).to("cpu"))
    bias = module[1].bias
    assert bias.dtype == torch.float32
    values = bias.detach().clone()
    lora.inject(module, r=4, targets=["1"])
    merge(randomize(module))
    assert module(torch.arange(9)).dtype == module[1].bias.dtype == torch.bfloat16
    lora.unmerge(module)
    assert module[1].bias is bias and torch.equal(bias, values)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_that_was_read_quantized_is_saved_after_a_merge(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama(kind).save_pretrained(tmp_path / "stored")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", dtype=torch.bfloat16).train()
    lora.inject(model, r=4, targets=["q_proj", "down_proj"])
    merge(randomize(model), unload=True)
    logits = model(tokens()).logits
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).train()
    assert torch.equal(again(tokens()).logits, logits)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gpt2_is_not_merged_into_16_bits(kind: str, tmp_path: Path) -> None:
    """Its Conv1D were turned round before they were quantized."""
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tiny_gpt2(n_embd=64, initializer_range=0.1, **drops).save_pretrained(tmp_path)
    model = llama(kind, path=tmp_path)
    logits = model(tokens()).logits
    lora.inject(model, r=4, targets=["c_attn", "c_proj"])
    assert torch.equal(model(tokens()).logits, logits)
    scaled(randomize(model), 1.0)
    with unchanged(model), pytest.raises(lora.LoraError, match="was a Conv1D before.*use into='.*load"):
        lora.merge(model)
    logits = model(tokens()).logits
    merge(model, into=kind)
    assert distance({"": model(tokens()).logits}, {"": logits}) < 0.3
    lora.unmerge(model)
    assert torch.equal(model(tokens()).logits, logits)


@kinds
def test_a_copy_of_a_merged_model_unmerges(kind: str) -> None:
    model = adapted(kind)
    logits = model(tokens()).logits
    merge(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        lora.unmerge(twin)
        assert torch.equal(twin(tokens()).logits, logits)
    lora.unmerge(model)
    assert torch.equal(model(tokens()).logits, logits)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merged_weights_are_pefts_in_float32(kind: str) -> None:
    """PEFT quantizes again, so it merges into the dequantized model here."""
    model = adapted(kind, torch.float32)
    other = peft.get_peft_model(
        dense_twin(model, torch.float32), peft.LoraConfig(r=4, lora_alpha=adapters_alpha(model), target_modules=TARGETS)
    )
    for name, _, adapters in hosts(model):
        layer = other.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data = adapters["default"].A.data.clone()
        layer.lora_B["default"].weight.data = adapters["default"].B.data.clone()
    merge(model, unload=True)
    theirs = other.merge_and_unload().state_dict()
    for name in theirs:
        if any(name.endswith(f"{target}.weight") for target in TARGETS):
            assert torch.allclose(model.state_dict()[name], theirs[name], rtol=0, atol=1e-6)


def adapters_alpha(model: nn.Module) -> float:
    part = next(adapters["default"] for _, _, adapters in hosts(model))
    return part.scaling * part.r
