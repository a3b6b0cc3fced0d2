"""Quantized bases on a GPU: the fused path beside dequantize-then-torch and float64, and bitsandbytes' own products."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import tiny_llama
from lora.bases.four_bit import FEW
from lora.bases.weight import weight_of
from test_gpu import distance, gradients, losses_of_a_captured_step, rule, tokens  # noqa: F401  (fixtures)

pytestmark = pytest.mark.gpu
KINDS = ["nf4", "fp4", "int8"]


def quantize(model: nn.Module, kind: str) -> nn.Module:
    """Put bitsandbytes' linear in the place of every one but the head, on the GPU."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            width = module.in_features, module.out_features
            if kind == "int8":
                new = bnb.nn.Linear8bitLt(*width, bias=False, has_fp16_weights=False, threshold=6.0)
            else:
                new = bnb.nn.Linear4bit(*width, bias=False, compute_dtype=torch.bfloat16, quant_type=kind)
            new.weight.data = module.weight.data.float().cpu()
            model.set_submodule(name, new)
    return model.to("cuda", torch.bfloat16)


def build(kind: str, **keywords: object) -> nn.Module:
    model = quantize(tiny_llama(hidden_size=256, intermediate_size=512, vocab_size=97), kind)
    model = lora.inject(model, **{"r": 16, "targets": "all-linear", **keywords})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.02)
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """The same adapter on plain linears of the dequantized weights."""
    plain = tiny_llama(hidden_size=256, intermediate_size=512, vocab_size=97).to("cuda", torch.bfloat16)
    for name, module in model.named_modules():
        weight = weight_of(module) if isinstance(module, nn.Linear) else None
        if weight is not None:
            plain.get_submodule(name).weight.data = weight.dense(torch.bfloat16).clone()
        elif module._parameters and ".lora" not in name:
            plain.get_submodule(name).weight.data = module.weight.data.clone()
    lora.inject(plain, r=16, targets="all-linear")
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if ".lora." in name:
            parameter.data = own[name].data.clone()
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_within_twice_dequantize_then_torch_and_repeats(
    kind: str,
    tokens: Tensor,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(kind).train()
    assert all(row.runs.startswith(f"fused over {kind}, ") for row in lora.summary(model).rows)
    logits, ours = gradients(model, tokens)
    _, again = gradients(model, tokens)
    assert all(torch.equal(ours[n], again[n]) for n in ours)
    plain = dequantized(model).train()
    exact_logits, exact = gradients(copy.deepcopy(plain).double(), tokens)
    from lora.layers import plan

    monkeypatch.setattr(plan, "DEVICES", ())
    plain_logits, torchs = gradients(plain, tokens)
    assert distance(ours, exact) <= 2 * distance(torchs, exact)
    assert distance({"y": logits}, {"y": exact_logits}) <= 2 * distance({"y": plain_logits}, {"y": exact_logits})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [True, "offload"])
def test_checkpointing_and_offload_give_the_same_bits(kind: str, how: bool | str, tokens: Tensor) -> None:  # noqa: F811
    model = build(kind, dropout=0.1).train()
    torch.manual_seed(0)
    _, want = gradients(model, tokens)
    lora.prepare(model, checkpointing=how)
    from lora.ops import offload

    offload.SMALLEST, before = 0, offload.SMALLEST
    try:
        for _ in range(2):
            torch.manual_seed(0)
            _, got = gradients(model, tokens)
            assert all(torch.equal(want[n], got[n]) for n in want)
    finally:
        offload.SMALLEST = before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 300])
def test_a_fresh_adapter_changes_no_bit_of_inference(kind: str, rows: int) -> None:
    net = quantize(nn.Sequential(nn.Linear(512, 384, bias=False)), kind).eval()
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        want = net(x)
        lora.inject(net, r=8, targets=["0"])
        assert torch.equal(net(x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind: str, tokens: Tensor) -> None:  # noqa: F811
    model = build(kind).eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        lora.merge(model)
        got = model(tokens, use_cache=False).logits
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert distance({"y": got}, {"y": want}) < 0.1
    model.cpu()
    model.cuda()
    lora.unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(tokens, use_cache=False).logits, want)


def test_the_dense_weight_is_gone_after_the_forward_pass() -> None:
    net = quantize(nn.Sequential(nn.Linear(4096, 4096, bias=False)), "nf4")
    lora.inject(net, r=8, targets=["0"])
    x = torch.randn(512, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_()
    net(x).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = net(x)
    assert torch.cuda.memory_allocated() - before < 4096 * 4096  # y, h and the copies of A and B; the weight is 32 MB
    y.sum().backward()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compile_fullgraph(kind: str, tokens: Tensor) -> None:  # noqa: F811
    model = build(kind).train()
    logits, want = gradients(model, tokens)
    got_logits, got = gradients(torch.compile(model, fullgraph=True), tokens)
    assert distance({"y": got_logits}, {"y": logits}) < 0.02
    assert distance(got, {f"_orig_mod.{name}": value for name, value in want.items()}) < 0.05


def test_outliers_of_int8_in_eval_mode() -> None:
    """The columns over the threshold are multiplied in 16 bits, as bitsandbytes' own linear does it."""
    net = quantize(nn.Sequential(nn.Linear(512, 384, bias=False)), "int8").eval()
    x = torch.randn(32, 512, device="cuda", dtype=torch.bfloat16)
    x[:, 7] *= 20
    with torch.no_grad():
        want = net(x)
        net[0].state.threshold = 0.0
        assert not torch.equal(net(x), want)
        net[0].state.threshold = 6.0
        lora.inject(net, r=8, targets=["0"])
        assert torch.equal(net(x), want)


def test_a_whole_training_step_is_captured_in_a_cuda_graph(tokens: Tensor) -> None:  # noqa: F811
    losses = losses_of_a_captured_step(build("nf4").train(), tokens)
    assert losses[-1] < losses[0] - 0.3
