"""prepare: checkpointing, norms and heads in float32; what offloading does on a CPU; and the summary that tells it."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
from conftest import randomize, same_bits, snapshot, tiny_bert, tiny_llama
from lora.layers.host import adapters_of
from lora.ops.offload import Offload

KINDS = [None, "nf4", "int8"]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def build(kind: str | None, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    from quantized_base import llama

    return randomize(lora.inject(llama(kind, dtype), r=4, targets=TARGETS, **settings))


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    from quantized_base import gradients

    torch.manual_seed(0)  # the dropout's
    return gradients(model, model(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients_to_the_bit(kind: str | None, ids: Tensor) -> None:
    model = build(kind, dropout=0.2)
    before = gradients(model, ids)
    calls: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert lora.prepare(model) is model
    assert same_bits(gradients(model, ids), before)
    assert len(calls) == 2  # once more in the backward pass
    assert lora.summary(model).prepared == "checkpointing"
    assert "prepared: checkpointing" in str(lora.summary(model))


def test_prepare_before_and_after_inject_is_the_same(ids: Tensor) -> None:
    from quantized_base import llama

    steps = [lambda m: lora.prepare(m, norms_fp32=True), lambda m: lora.inject(m, r=4, targets=TARGETS, init="kaiming")]
    found = []
    for one, other in (steps, steps[::-1]):
        torch.manual_seed(0)
        model = other(one(llama("nf4")))
        assert lora.summary(model).prepared == "checkpointing, norms in float32"
        found.append(gradients(randomize(model), ids))
    assert same_bits(*found)


def test_true_after_offload_goes_back_to_plain_checkpointing(ids: Tensor) -> None:
    model = lora.prepare(build(None))
    before = gradients(model, ids)
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = Offload()
    assert lora.summary(model).prepared == "checkpointing with its inputs in host memory"
    assert same_bits(gradients(model, ids), before)
    assert same_bits(gradients(copy.deepcopy(model), ids), before)
    lora.prepare(model, checkpointing=False)
    assert lora.summary(model).prepared == "checkpointing with its inputs in host memory"
    lora.prepare(model)
    assert lora.summary(model).prepared == "checkpointing"


def test_offload_of_cpu_tensors_is_plain_checkpointing() -> None:
    layer = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))
    found = []
    for run in (Offload(), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        x = torch.randn(2048, 256, generator=torch.Generator().manual_seed(1)).requires_grad_()  # over SMALLEST
        layer.zero_grad()
        run(layer, x * 1).square().sum().backward()
        found.append({"x": x.grad, **{n: p.grad.clone() for n, p in layer.named_parameters()}})
    assert same_bits(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_in_float32_leave_the_layers_in_their_dtype(kind: str | None, dtype: torch.dtype, ids: Tensor) -> None:
    model = build(kind, dtype)
    logits = model(ids).logits
    lora.prepare(model, checkpointing=False, norms_fp32=True)
    seen: set[torch.dtype] = set()
    for name, module in model.named_modules():
        if name.endswith("proj"):
            module.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    found = model(ids).logits
    assert seen == {dtype} == {found.dtype}
    assert (found - logits).norm() < 0.05 * logits.norm()
    assert model.model.norm.weight.dtype == torch.float32
    assert lora.summary(model).prepared == "norms in float32"
    again = snapshot(lora.prepare(model, checkpointing=False, norms_fp32=True))
    assert same_bits(snapshot(model), again) and len(model.model.norm._forward_hooks) == 1
    assert torch.equal(
        pickle.loads(pickle.dumps(model.model.norm))(x := torch.ones(2, 64, dtype=dtype)), torch.ones_like(x)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_head_gives_float32_logits_close_to_those_before(kind: str | None, ids: Tensor) -> None:
    model = build(kind)
    logits = model(ids).logits
    for _ in range(2):  # the second time changes nothing
        lora.prepare(model, checkpointing=False, head_dtype=torch.float32)
        found = model(ids).logits
        assert found.dtype == model.lm_head.weight.dtype == torch.float32
        assert torch.equal(found.bfloat16(), logits)
        assert lora.summary(model).prepared == "lm_head in float32"
    found.sum().backward()


def test_a_head_in_another_dtype_keeps_its_adapters_and_copies(ids: Tensor) -> None:
    model = build(None, torch.float32)
    lora.inject(model, r=4, targets=["lm_head"], name="head")
    lora.prepare(model, checkpointing=False, head_dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == model(ids).logits.dtype == torch.bfloat16
    assert adapters_of(model.lm_head)["head"].A.dtype == torch.float32
    whole = build(None, train=["lm_head"])
    lora.prepare(whole, checkpointing=False, head_dtype=torch.float32)
    whole(ids).logits.sum().backward()
    assert adapters_of(whole.lm_head)["default"].module.weight.grad.dtype == torch.float32


def test_a_head_of_several_layers(ids: Tensor) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=97,
        max_position_embeddings=64,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).bfloat16().eval()
    lora.inject(model, r=4, targets=["query"])
    lora.prepare(model, checkpointing=False, head_dtype=torch.float32)
    assert model(ids).logits.dtype == torch.float32
    assert lora.summary(model).prepared == "classifier in float32"


class Plain(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (tiny_llama, {"checkpointing": "offload"}, "'offload' moves inputs from a GPU .* no parameter is on one"),
        (tiny_llama, {"checkpointing": "host"}, "got 'host'; allowed are True, False and 'offload'"),
        (tiny_llama, {"head_dtype": torch.int8}, "got torch.int8; a floating-point torch.dtype is expected"),
        (
            lambda: tiny_llama(tie_word_embeddings=True).bfloat16(),
            {"head_dtype": torch.float32, "norms_fp32": True},
            "'lm_head' is tied to 'model.embed_tokens'.*leave it None",
        ),
        (lambda: Plain(nn.Linear(4, 4)), {}, "Plain does not know it; pass checkpointing=False"),
        (lambda: Plain(nn.Linear(4, 4)), {"head_dtype": torch.float32}, "Plain has no output head"),
    ],
    ids=["offload", "unknown", "integers", "tied", "no checkpointing", "no head"],
)
def test_what_cannot_be_prepared_is_refused_and_nothing_changes(make: Any, settings: Any, message: str) -> None:
    model = make()
    before, hooks = snapshot(model), [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(lora.LoraError, match=message):
        lora.prepare(model, **settings)
    assert same_bits(snapshot(model), before)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not getattr(model, "is_gradient_checkpointing", False)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_weight_not_quantized_yet_is_refused(kind: str) -> None:
    from quantized_base import linear

    model = nn.Sequential(linear(kind, 64, 64))
    with pytest.raises(lora.LoraError, match="not quantized yet"):
        lora.prepare(model, checkpointing=False)
    lora.prepare(model.to("cpu"), checkpointing=False)


@pytest.mark.parametrize("kind", ["nf4", "nested nf4", "int8"])
def test_summary_counts_a_quantized_weights_elements(kind: str) -> None:
    model, dense = build(kind), build(None)
    summary = lora.summary(model)
    assert summary.total == lora.summary(dense).total
    assert {row.runs for row in summary.rows} == {f"plain torch over {kind[-4:].strip()} (on cpu)"}
    assert ("training multiplies by the dequantized weights" in str(summary)) == (kind == "int8")
    assert "int8" not in str(lora.summary(dense))
    lora.merge(model)
    assert lora.summary(model).total == summary.total


def test_an_encoder_can_be_prepared_too(ids: Tensor) -> None:
    model = randomize(lora.inject(tiny_bert().bfloat16(), r=4, targets=["query"])).train()
    lora.prepare(model, norms_fp32=True, head_dtype=torch.float64)
    assert model(ids).logits.dtype == torch.float64
    assert lora.summary(model).prepared == "checkpointing, norms in float32, classifier in float64"
