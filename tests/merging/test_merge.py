"""merge: the float64 sum rounded once, and a report of what the rounding kept."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora
from conftest import randomize, same_bits, snapshot, tiny_bert, tiny_gpt2
from lora.layers import adapters_of, hosts
from two_kinds import DTYPES, TwoKinds, matrix, merge, scale_updates, update64


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.double().abs().clamp(min=info.smallest_normal)))
    return info.eps * torch.exp2(exponent)


@pytest.mark.parametrize("ratio", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_weight_is_the_float64_sum_rounded_once(dtype: torch.dtype, ratio: float) -> None:
    model = TwoKinds(dtype=dtype)
    lora.inject(model, r=4, targets=["linear", "conv"])
    scale_updates(model, ratio)
    wanted = {host: matrix(host).detach().double() + update64(host) for host in (model.linear, model.conv)}
    merge(model)
    for host, exact in wanted.items():
        error = (matrix(host).double() - exact).abs()
        # Half a unit in the last place, and what summing in fp32 may add: D and the sum rounded once each.
        fp32 = torch.finfo(torch.float32).eps * (exact.abs() + update64(host).abs())
        allowed = ulp(torch.maximum(exact.abs(), matrix(host).double().abs()), dtype) / 2 + fp32
        assert (error <= allowed).all()
        if dtype is not torch.float32:  # the nearest value but near a tie: no truncation, no D rounded to `dtype` first
            assert (matrix(host) == exact.to(dtype)).double().mean() > 0.999


@pytest.mark.parametrize("ratio", [0.001, 0.03, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_report_against_float64(dtype: torch.dtype, ratio: float) -> None:
    model = TwoKinds(dtype=dtype)
    lora.inject(model, r=4, targets=["linear", "conv"])
    scale_updates(model, ratio)
    old = {name: matrix(host).detach().double() for name, host, _ in hosts(model)}
    report = merge(model)
    assert [m.name for m in report.modules] == ["linear", "conv"]
    for entry in report.modules:
        host = model.get_submodule(entry.name)
        wanted, change = update64(host), matrix(host).detach().double() - old[entry.name]
        kept = ((change * wanted).sum() / wanted.square().sum()).item()
        noise = ((change - wanted).norm() / wanted.norm()).item()
        fp32 = 2 * torch.finfo(torch.float32).eps  # W - W0 and D are held in fp32
        assert entry.kept == pytest.approx(kept, rel=1e-6, abs=fp32)
        assert entry.noise == pytest.approx(noise, rel=1e-4, abs=fp32)
        assert entry.dtype == dtype
        assert entry.shape == (192, 160)
    assert report.kept == min(m.kept for m in report.modules)
    lines = str(report).splitlines()
    assert len(lines) == 4
    assert all(f"{entry.kept:.2%}" in str(report) for entry in report.modules)


def test_warning_when_less_than_99_percent_survives() -> None:
    model = TwoKinds(dtype=torch.bfloat16)
    lora.inject(model, r=4, targets=["linear", "conv"])
    scale_updates(model, 1.0)
    scale = adapters_of(model.conv)["default"]
    scale.B.data *= 1e-4
    with pytest.warns(lora.LoraWarning, match=r"1 of 2 modules .*bfloat16.*\(conv\)") as caught:
        report = lora.merge(model)
    assert caught[0].filename == __file__  # points at the caller
    assert report.kept < 0.99
    assert f"{report.kept:.1%}" in str(caught[0].message)


def test_no_warning_when_all_survives() -> None:
    model = TwoKinds()
    lora.inject(model, r=4, targets=["linear", "conv"])
    scale_updates(model, 0.1)
    assert lora.merge(model).kept > 0.999  # a LoraWarning would be an error here: see pyproject.toml


def test_fresh_adapter_merges_to_the_same_bits_and_reports_all_kept() -> None:
    model = TwoKinds(dtype=torch.float16)
    before = snapshot(model)
    lora.inject(model, r=4, targets=["linear", "conv"])
    assert lora.merge(model).kept == 1.0
    assert all(torch.equal(before[k], model.state_dict()[k]) for k in before)


def test_merged_layer_is_the_plain_class_and_runs_its_own_forward() -> None:
    model = TwoKinds()
    lora.inject(randomize(model), r=4, targets=["linear", "conv"])
    merge(model)
    for host, plain in ((model.linear, nn.Linear), (model.conv, Conv1D)):
        assert type(host) is plain
        assert "forward" not in host.__dict__
        assert not host._forward_hooks
        assert not host._forward_pre_hooks
    x = torch.randn(3, 160)
    assert torch.equal(model.linear(x), nn.functional.linear(x, model.linear.weight, model.linear.bias))


def test_merge_unload_leaves_the_plain_model() -> None:
    model = tiny_bert()
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    lora.inject(model, targets=["query", "value"], bias="all", train=["classifier"])
    randomize(model)
    x = torch.arange(1, 9)[None]
    before = model(x).logits
    lora.merge(model, unload=True)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == grads
    torch.testing.assert_close(model(x).logits, before, rtol=1e-5, atol=1e-6)
    with pytest.raises(lora.LoraError, match="not merged"):
        lora.unmerge(model)


def merged_by_hand(base: nn.Module, adapted: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the base with W0 + D and the trained biases and modules, all computed in float64."""
    plain = copy.deepcopy(base).to(dtype)
    with torch.no_grad():
        for name, host, adapters in hosts(adapted):
            mine = plain.get_submodule(name)
            source = base.get_submodule(name)
            for active in adapters.active:
                part = adapters[active]
                if hasattr(part, "A"):
                    continue
                for n, p in part.module.named_parameters():
                    mine.get_parameter(n).copy_(p)
            if hasattr(adapters[adapters.active[0]], "A"):
                total = source.weight.double() + (update64(host).t() if isinstance(source, Conv1D) else update64(host))
                mine.weight.copy_(total)
                biases = [adapters[a].bias for a in adapters.active if adapters[a].bias is not None]
                if biases:
                    start = source.bias.double()
                    mine.bias.copy_(start + sum(b.double() - start for b in biases))
    return plain


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_bert], ids=["gpt2", "bert"])
def test_merged_logits_against_float64(build: Callable[[], nn.Module], bias: str) -> None:
    ids = torch.randint(1, 97, (64, 11), generator=torch.Generator().manual_seed(3))
    model = build()
    base = copy.deepcopy(model)
    targets, whole = (["c_attn", "c_proj"], ["ln_f"]) if build is tiny_gpt2 else (["query", "value"], ["classifier"])
    lora.inject(model, r=4, targets=targets, bias=bias, train=whole)
    randomize(model)
    exact = merged_by_hand(base, model, torch.float64)(ids).logits
    plain = merged_by_hand(base, model, torch.float32)(ids).logits
    assert (exact - base.double()(ids).logits).abs().max() > 0.01  # the adapter does something
    own_error = (plain.double() - exact).norm()
    assert (model(ids).logits.double() - exact).norm() <= 2 * own_error
    merge(model)
    assert (model(ids).logits.double() - exact).norm() <= 2 * own_error


def test_several_active_adapters_merge_to_their_sum() -> None:
    model = TwoKinds()
    lora.inject(model, r=2, alpha=3, targets=["linear", "conv"], name="a", bias="lora_only")
    randomize(model, seed=1)
    lora.inject(model, r=3, targets=["linear"], name="b", rslora=True)
    randomize(model, seed=2)
    lora.inject(model, r=5, targets=["linear", "conv"], name="idle")
    randomize(model, seed=3)
    lora.activate(model, ["a", "b"])
    base = snapshot(model)
    wanted = model.linear.weight.double() + update64(model.linear, ["a", "b"])
    wanted_conv = matrix(model.conv).double() + update64(model.conv, ["a"])
    merge(model)
    eps = torch.finfo(torch.float32).eps
    assert ((model.linear.weight.double() - wanted).abs() <= 2 * eps * wanted.abs().clamp(min=1)).all()
    assert ((matrix(model.conv).double() - wanted_conv).abs() <= 2 * eps * wanted_conv.abs().clamp(min=1)).all()
    lora.unmerge(model)
    assert same_bits(snapshot(model), base)
    assert adapters_of(model.linear).active == ("a", "b")
