"""merge and unmerge: one rounding, all or nothing, and the way back to the bit."""

import contextlib
import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora
from conftest import randomize, same_bits, snapshot, tiny_bert, tiny_gpt2, tiny_llama
from lora.bases.dense import Dense
from lora.layers.host import adapters_of, hosts

TRAINED = Path(__file__).parents[1] / "examples" / "tiny-llama-8m"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class TwoKinds(nn.Module):
    """A linear and a Conv1D of one shape, with weights as training leaves them: heavy tails and loud columns."""

    def __init__(self, rows: int = 192, columns: int = 160, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, rows)
        self.conv = Conv1D(rows, columns)
        generator = torch.Generator().manual_seed(7)
        for weight in (self.linear.weight.data, self.conv.weight.data):
            body = torch.randn(weight.shape, generator=generator)
            tail = torch.randn(weight.shape, generator=generator).abs() + 0.2
            weight.copy_(0.02 * body / tail.sqrt())
            weight[:, ::37] *= 8
            weight[3, :3] = torch.tensor([0.0, -0.0, 1e-7])
        self.conv.bias.data.normal_(generator=generator)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.conv(x)


def matrix(host: nn.Module) -> Tensor:
    return host.weight.t() if isinstance(host, Conv1D) else host.weight


def update64(host: nn.Module, names: list[str] | None = None) -> Tensor:
    """D in float64, from the adapters' own tensors."""
    found = adapters_of(host)
    return sum(
        found[n].scaling * (found[n].B.detach().double() @ found[n].A.detach().double()) for n in names or found.active
    )


def scale_updates(model: nn.Module, ratio: float, seed: int = 1) -> None:
    """Random A and B, so that each D has `ratio` of its W0's norm."""
    generator = torch.Generator().manual_seed(seed)
    for _, host, adapters in hosts(model):
        part = adapters[adapters.active[0]]
        part.A.data.normal_(generator=generator)
        part.B.data.normal_(generator=generator)
        part.B.data *= ratio * host.weight.double().norm() / update64(host).norm()


def merge(model: nn.Module, **keywords: object) -> "lora.merging.MergeReport":
    """merge without its warning about rounding, which most of these tests cause on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora.LoraWarning)
        return lora.merge(model, **keywords)


def state_of(model: nn.Module) -> tuple:
    """All that a failed verb must leave alone, but the values of tensors."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.dtype, id(p)) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, adapters.active, adapters.undo is None) for name, _, adapters in hosts(model)],
    )


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    values, state = snapshot(model), state_of(model)
    yield
    assert state_of(model) == state
    assert same_bits(snapshot(model), values)


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.double().abs().clamp(min=info.smallest_normal)))
    return info.eps * torch.exp2(exponent)


@pytest.mark.parametrize("ratio", [0.001, 0.03, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerge_is_bit_exact_after_100_cycles(dtype: torch.dtype, ratio: float) -> None:
    model = TwoKinds(96, 80, dtype)
    lora.inject(model, r=4, targets=["linear", "conv"])
    scale_updates(model, ratio)
    before = snapshot(model)
    merge(model)
    merged = snapshot(model)
    assert not torch.equal(merged["linear.weight"], before["linear.weight"])
    for _ in range(99):
        lora.unmerge(model)
        assert same_bits(snapshot(model), before)
        merge(model)
        assert same_bits(snapshot(model), merged)
    lora.unmerge(model)
    assert same_bits(snapshot(model), before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_unmerge_is_bit_exact_in_several_blocks_and_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.exact.patch._BLOCK", 1000)  # 160 columns: 6 rows a block, and a shorter last one
    model = TwoKinds(193, 160, dtype)
    lora.inject(model, r=5, targets=["linear", "conv"])
    scale_updates(model, 0.3)
    before = snapshot(model)
    merge(model)
    assert len(adapters_of(model.linear).undo.patches) == math.ceil(193 / 6)
    try:
        torch.set_num_threads(1)
        lora.unmerge(model)
    finally:
        torch.set_num_threads(2)
    assert same_bits(snapshot(model), before)


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


def reachable_bytes(thing: object, seen: set[int] | None = None) -> int:
    """Bytes of every tensor storage that an object holds, each storage once and whole (a view holds all of it)."""
    seen = set() if seen is None else seen
    if isinstance(thing, Tensor):
        storage = thing.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(thing, dict):
        return sum(reachable_bytes(v, seen) for v in thing.values())
    if isinstance(thing, (list, tuple, set)):
        return sum(reachable_bytes(v, seen) for v in thing)
    return reachable_bytes(vars(thing), seen) if hasattr(thing, "__dict__") else 0


@pytest.mark.parametrize("ratio", [0.001, 0.03, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["heavy tails", "gaussian"])
def test_undo_memory(dtype: torch.dtype, ratio: float, kind: str) -> None:
    """At most 15 % in the ordinary case; a fifth where eight-fold columns and heavy tails carry W0's norm."""
    model = TwoKinds(768, 512, dtype)
    if kind == "gaussian":
        for weight in (model.linear.weight, model.conv.weight):
            weight.data.normal_(std=0.02)
    lora.inject(model, r=8, targets=["linear", "conv"])
    scale_updates(model, ratio)
    merge(model)
    for host in (model.linear, model.conv):
        undo = adapters_of(host).undo
        held = reachable_bytes(undo)
        assert undo.nbytes <= held <= 0.15 * host.weight.nbytes, held / host.weight.nbytes
        assert held == pytest.approx(undo.nbytes, rel=0.01, abs=16)  # what it says is what it holds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_undo_memory_on_a_trained_model(dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=dtype)
    lora.inject(model, r=8, targets="all-linear")
    scale_updates(model, 0.1)
    merge(model)
    weights = sum(host.weight.nbytes for _, host, _ in hosts(model))
    assert sum(reachable_bytes(adapters.undo) for _, _, adapters in hosts(model)) <= 0.15 * weights


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


def test_unload_with_an_idle_adapter_is_refused() -> None:
    model = TwoKinds()
    lora.inject(model, targets=["linear"], name="a")
    lora.inject(model, targets=["linear"], name="b")
    with unchanged(model), pytest.raises(lora.LoraError, match=r"\ba\b"):
        lora.merge(model, unload=True)


# All or nothing


def test_overflow_in_the_last_module_changes_nothing() -> None:
    model = TwoKinds(dtype=torch.float16)
    lora.inject(model, r=2, targets=["linear", "conv"], bias="lora_only")
    scale_updates(model, 0.5)
    conv = adapters_of(model.conv)["default"]
    conv.A.data.fill_(1.0)
    conv.B.data[-1].fill_(1e6)
    with unchanged(model), pytest.raises(lora.LoraError, match="conv"):
        merge(model)
    conv.B.data[-1].fill_(0.0)
    with unchanged(model):
        merge(model)
        lora.unmerge(model)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["A", "B", "bias", "whole", "whole bias"])
def test_non_finite_values_anywhere_are_refused_before_the_first_write(place: str, value: float) -> None:
    model = tiny_bert()
    lora.inject(model, targets=["query", "value"], bias="all", train=["classifier"])
    randomize(model)
    *_, last = (m for n, m in model.named_modules() if n.endswith("value"))
    norm = model.bert.encoder.layer[1].output.LayerNorm
    tensor = {
        "A": last.lora["default"].A,
        "B": last.lora["default"].B,
        "bias": last.lora["default"].bias,
        "whole": model.classifier.lora["default"].module.weight,
        "whole bias": norm.lora["default"].module.bias,
    }[place]
    tensor.data.view(-1)[-1] = value
    writes = []
    with unchanged(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dense, "write_", lambda *a: writes.append(a))
        with pytest.raises(lora.LoraError, match="NaN or infinity"):
            merge(model)
    assert not writes


def test_a_trained_bias_beyond_fp16_is_refused() -> None:
    model = TwoKinds(dtype=torch.float16)
    lora.inject(model, targets=["linear", "conv"], bias="lora_only")
    adapters_of(model.conv)["default"].bias.data[0] = 1e6
    with unchanged(model), pytest.raises(lora.LoraError, match="conv"):
        merge(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("failing", ["linear", "conv"])
@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_a_write_that_fails_is_rolled_back(
    verb: str, failing: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TwoKinds(dtype=torch.bfloat16)
    lora.inject(model, targets=["linear", "conv"], bias="lora_only")
    scale_updates(model, 0.5)
    randomize(model, std=1e-3)
    if verb == "unmerge":
        merge(model)
    write, left = Dense.write_, [1]

    def fail_once(weight: Dense, rows: slice, values: Tensor) -> None:
        if weight.module is getattr(model, failing) and left:
            left.pop()
            raise error("the disk is on fire")
        write(weight, rows, values)

    monkeypatch.setattr(Dense, "write_", fail_once)
    with unchanged(model), pytest.raises(error):
        merge(model) if verb == "merge" else lora.unmerge(model)
    assert not left


def test_unmerge_that_fails_in_the_last_module_stays_merged() -> None:
    model = TwoKinds(dtype=torch.bfloat16)
    lora.inject(model, targets=["linear", "conv"])
    scale_updates(model, 0.5)
    merge(model)
    A = adapters_of(model.conv)["default"].A
    kept = A.detach().clone()
    A.data[0] += 1
    with unchanged(model), pytest.raises(lora.LoraError, match="conv"):
        lora.unmerge(model)
    A.data.copy_(kept)
    lora.unmerge(model)
    assert type(model.conv).__name__ != "Conv1D"  # acts again


@pytest.mark.parametrize("what", ["A", "B", "weight", "scaling", "bias"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_change_while_merged_is_refused_and_the_weight_stays(kind: str, what: str) -> None:
    model = TwoKinds()
    lora.inject(model, targets=["linear", "conv"], bias="lora_only")
    scale_updates(model, 0.1)
    randomize(model, std=1e-3)
    merge(model)
    host = getattr(model, kind)
    part = adapters_of(host)["default"]
    if what == "scaling":
        part.scaling *= 2
    else:
        tensor = {"A": part.A, "B": part.B, "weight": host.weight, "bias": host.bias}[what]
        tensor.data.view(-1)[5] += 0.5
    for verb in (lora.unmerge, lora.remove):
        with unchanged(model), pytest.raises(lora.LoraError, match=kind):
            verb(model)


def test_a_flipped_sign_in_float64_is_noticed() -> None:
    model = TwoKinds(dtype=torch.float64)
    lora.inject(model, targets=["linear"])
    scale_updates(model, 0.1)
    adapters_of(model.linear)["default"].B.data[:2] = 0
    merge(model)
    for place in range(4):
        model.linear.weight.data[0, place] *= -1
        if model.linear.weight[0, place] != 0:
            with pytest.raises(lora.LoraError, match="linear"):
                lora.unmerge(model)
        model.linear.weight.data[0, place] *= -1
    lora.unmerge(model)


# Ties


def test_tied_linears_are_refused() -> None:
    model = TwoKinds()
    model.other = nn.Linear(160, 192)
    model.other.weight = model.linear.weight
    lora.inject(model, targets=["linear"])
    randomize(model)
    with unchanged(model), pytest.raises(lora.LoraError, match=r"linear\.weight and other\.weight"):
        lora.merge(model)


@pytest.mark.parametrize("how", ["same storage", "transpose"])
def test_weights_that_share_memory_are_refused_as_tied(how: str) -> None:
    model = nn.Module()
    model.linear = nn.Linear(16, 16)
    model.other = nn.Linear(16, 16)
    model.other.weight = nn.Parameter(model.linear.weight.data.t() if how == "transpose" else model.linear.weight.data)
    lora.inject(model, targets=["linear"])
    randomize(model)
    with unchanged(model), pytest.raises(lora.LoraError, match=r"tied|memory"):
        lora.merge(model)


def test_tied_biases_are_refused_or_right() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].bias = model[0].bias
    x = torch.randn(5, 6)
    try:
        lora.inject(model, targets=["0", "1"], bias="lora_only")
    except lora.LoraError:
        return
    randomize(model)
    before = model(x)
    try:
        lora.merge(model)
    except lora.LoraError:
        return
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


def test_tied_pair_trained_whole_merges_and_comes_back_tied() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    base = snapshot(model)
    lora.inject(model, targets=["q_proj"], train=["embed_tokens", "lm_head"])
    randomize(model)
    ids = torch.arange(1, 12)[None]
    before = model(ids).logits
    merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, base["lm_head.weight"])
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
    lora.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(ids).logits, before)
    lora.remove(model)
    assert same_bits(snapshot(model), base)


# Against a float64 oracle over whole models


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


# Life while merged


def merged_model(dtype: torch.dtype = torch.bfloat16) -> tuple[TwoKinds, dict[str, Tensor]]:
    """(merged model, its state dict before the merge)"""
    model = TwoKinds(dtype=dtype)
    lora.inject(model, targets=["linear", "conv"], bias="lora_only")
    scale_updates(model, 0.2)
    randomize(model, std=1e-3)
    before = snapshot(model)
    merge(model)
    return model, before


def test_disabled_in_merged_is_the_base_and_merged_again_after() -> None:
    model, before = merged_model()
    with unchanged(model):
        with lora.disabled(model):
            assert same_bits(snapshot(model), before)
            assert type(model.linear) is nn.Linear
            with lora.disabled(model):
                assert same_bits(snapshot(model), before)
            assert same_bits(snapshot(model), before)
        with pytest.raises(KeyError), lora.disabled(model):
            raise KeyError


def test_merge_in_disabled_ends_with_the_block() -> None:
    model, _ = merged_model()
    lora.unmerge(model)
    with unchanged(model), lora.disabled(model):
        with pytest.raises(lora.LoraError, match="no adapter acts"):
            lora.merge(model)
        lora.activate(model, "default")
        merge(model)
    with unchanged(model), contextlib.suppress(KeyError), lora.disabled(model):
        lora.activate(model, "default")
        merge(model)
        raise KeyError
    assert type(model.linear).__name__ != "Linear"


def test_merged_in_disabled_in_merged() -> None:
    model, _ = merged_model()
    with unchanged(model), lora.disabled(model):
        lora.activate(model, "default")
        merge(model)
        with lora.disabled(model):
            pass


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("merged", [True, False])
def test_copies_unmerge_on_their_own(how: str, merged: bool) -> None:
    model, before = merged_model()
    if not merged:
        lora.unmerge(model)
    x = torch.randn(4, 160, dtype=torch.bfloat16)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    values = snapshot(model)
    assert torch.equal(other(x), model(x))
    assert same_bits(snapshot(other), values)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    if merged:
        lora.unmerge(other)
        assert same_bits(snapshot(other), before)
        assert same_bits(snapshot(model), values)  # no shared memory
    adapters_of(other.linear)["default"].B.data.zero_()
    assert same_bits(snapshot(model), values)
    lora.remove(other)
    assert type(other.linear) is nn.Linear
    assert type(other.conv) is Conv1D
    assert len(list(hosts(model))) == 2


def test_state_dict_of_a_merged_model_loads_back() -> None:
    model, before = merged_model()
    merged = snapshot(model)
    model.load_state_dict(merged)
    lora.unmerge(model)
    assert same_bits(snapshot(model), before)
    merge(model)
    model.load_state_dict(before)  # the weights of the unmerged model, into a model that takes itself for merged
    with unchanged(model), pytest.raises(lora.LoraError, match="changed after the merge"):
        lora.unmerge(model)


def test_cast_while_merged_is_refused_at_unmerge_and_keeps_the_merged_values() -> None:
    model, _ = merged_model(torch.float32)
    model.to(torch.bfloat16)
    with unchanged(model), pytest.raises(lora.LoraError, match=r"float32 and is torch\.bfloat16"):
        lora.unmerge(model)
    with unchanged(model), pytest.raises(lora.LoraError), lora.disabled(model):
        pass


def test_merge_under_inference_mode_comes_back_outside_it() -> None:
    model = TwoKinds(dtype=torch.bfloat16)
    lora.inject(model, targets=["linear", "conv"], bias="lora_only")
    scale_updates(model, 0.2)
    before = snapshot(model)
    with torch.inference_mode():
        merge(model)
    lora.unmerge(model)
    assert same_bits(snapshot(model), before)
    model(torch.randn(2, 160, dtype=torch.bfloat16)).float().sum().backward()
    assert adapters_of(model.linear)["default"].B.grad is not None


@pytest.mark.parametrize("kind", ["parametrized", "weight_norm", "expanded", "float8"])
def test_weights_that_cannot_take_a_merge_are_refused_in_words(kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if kind == "parametrized":
        nn.utils.parametrizations.weight_norm(model[1])
    elif kind == "weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(model[1])
    elif kind == "expanded":
        model[1].weight = nn.Parameter(torch.randn(8, 1).expand(8, 8))
    else:
        model[1].weight = nn.Parameter(model[1].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    try:
        lora.inject(model, targets=["0", "1"])
    except lora.LoraError:
        return
    randomize(model)
    with unchanged(model), pytest.raises(lora.LoraError):
        lora.merge(model)


def test_meta_weights_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    lora.inject(model, targets=["0"])
    with pytest.raises(lora.LoraError, match="meta"):
        lora.merge(model)


def test_merge_twice_and_unmerge_of_the_unmerged_are_refused() -> None:
    model, _ = merged_model()
    with unchanged(model), pytest.raises(lora.LoraError, match="merged already"):
        lora.merge(model)
    for verb in (lambda: lora.activate(model, "default"), lambda: lora.inject(model, targets=["conv"], name="b")):
        with unchanged(model), pytest.raises(lora.LoraError, match="unmerge"):
            verb()
    lora.unmerge(model)
    with unchanged(model), pytest.raises(lora.LoraError, match="not merged"):
        lora.unmerge(model)
