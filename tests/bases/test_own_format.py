"""A format of the test's own, registered from outside: int4 rows, two weights a byte, one fp16 scale a row."""

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
import stranger
from conftest import randomize, same_bits, snapshot
from lora import bases
from lora.ops.dequantize import layout, register_layout
from lora.ops.frozen_linear import frozen_linear
from stranger import RowLayout, RowLinear, RowWeight, quantize

dequantize = torch.ops.lora.dequantize


class Shifted(RowLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with stranger.registered():
        yield
    assert bases.weight_kind(RowLinear) is None
    with pytest.raises(lora.LoraError, match="allowed: int8:OUTxIN, nf4:OUTxIN:BLOCK, .*NESTED; write"):
        layout("int4_rows:2x2")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def net(kind: type[RowLinear] = RowLinear) -> nn.Sequential:
    """64 -> 96 -> 96 -> 32."""
    shapes = [(96, 64), (96, 96), (32, 96)]
    linears = [kind(random(*shape, seed=i) / shape[1] ** 0.5, random(shape[0])) for i, shape in enumerate(shapes)]
    return nn.Sequential(linears[0], nn.Tanh(), linears[1], nn.Tanh(), linears[2])


def adapted(seed: int = 0, **settings: Any) -> nn.Sequential:
    """Adapters on the first and the last linear."""
    return randomize(lora.inject(net(), r=4, alpha=8, targets=["0", "4"], **settings), seed)


def oracle(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same net in plain torch: dense weights, the adapters as one more product each."""

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ab = nn.ParameterDict({
                name.replace(".", "_"): nn.Parameter(p.detach().to(dtype))
                for name, p in model.named_parameters() if ".lora." in name
            })  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            for name in ("0", "2", "4"):
                host: Any = model.get_submodule(name)
                W = dequantize([host.weight, host.scale], f"int4_rows:{host.out_features}x{host.in_features}", dtype)
                y = nn.functional.linear(x, W, host.bias.detach().to(dtype))
                if f"{name}_lora_default_A" in self.ab:
                    A, B = (self.ab[f"{name}_lora_default_{half}"] for half in "AB")
                    y = y + 2 * (x @ A.t()) @ B.t()
                x = y if name == "4" else y.tanh()
            return x

    return Twin()


def outcome(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, dx and the gradients of A and B, in float64."""
    x = random(9, 64).to(dtype).requires_grad_()
    model.zero_grad()
    y = model(x)
    (y.double() * random(9, 32, seed=1)).sum().backward()
    grads = {n.removeprefix("ab.").replace(".", "_"): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: t.detach().double() for n, t in {"y": y, "x": x.grad, **grads}.items() if t is not None}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert found.keys() == exact.keys() and len(found) == 6
    missed = sum((found[n] - exact[n]).square().sum().item() for n in exact)
    return (missed / sum(t.square().sum().item() for t in exact.values())) ** 0.5


def test_frozen_linear_and_elements_of_a_layout_from_outside() -> None:
    host = net()[0]
    parts, text = [host.weight, host.scale], "int4_rows:96x64"
    assert str(layout(text)) == text and len(layout(text).parts) == 2
    weight, x = dequantize(parts, text, torch.float32), random(5, 64).requires_grad_()
    assert torch.equal(weight[3, 17], layout(text).element(parts, 3, 17))
    y = frozen_linear(x, parts, text, host.bias)
    assert torch.equal(y, host(x))
    y.sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(5, 64), atol=1e-5)
    torch.library.opcheck(torch.ops.lora.dequantize, (parts, text, torch.bfloat16))
    with pytest.raises(lora.LoraError, match="allowed for int4_rows:96x64"):
        dequantize(parts[:1], text, torch.float32)
    with pytest.raises(lora.LoraError, match="'int8' is a layout already"):
        register_layout("int8", RowLayout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_against_float64_on_the_dense_weights(dtype: torch.dtype) -> None:
    model = adapted()
    assert [type(model[i]).__name__ for i in (0, 2, 4)] == [
        "LoraLinear[RowLinear]", "FrozenLinear[RowLinear]", "LoraLinear[RowLinear]"
    ]  # fmt: skip
    exact = outcome(oracle(model, torch.float64), torch.float64)
    plain = outcome(oracle(model, dtype), dtype)
    assert distance(outcome(model, dtype), exact) <= 2 * distance(plain, exact)


def test_checkpointing_and_compiled_code_change_no_bit() -> None:
    model = adapted()
    found = outcome(model, torch.float32)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.net, x, use_reentrant=False)
            return y

    again = outcome(Checkpointed(), torch.float32)
    assert same_bits(found, {name.removeprefix("net_"): t for name, t in again.items()})
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(random(9, 64)), model(random(9, 64)))


def test_summary_has_the_format_and_its_note() -> None:
    model = adapted()
    text = str(lora.summary(model))
    assert "int4" in {word.strip("()") for row in lora.summary(model).rows for word in row.runs.split()}
    assert text.endswith("int4: a note of its own")
    assert lora.summary(model).total == sum(w * h + w for w, h in ((96, 64), (96, 96), (32, 96))) + model_ranks(model)


def model_ranks(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".lora." in name)


def test_remove_leaves_no_trace() -> None:
    model = net()
    state, x = snapshot(model), random(5, 64)
    out = model(x)
    lora.inject(model, r=4, targets=["0"])
    assert torch.equal(model(x), out)
    lora.remove(model)
    assert {type(m) for m in model} == {RowLinear, nn.Tanh}
    assert same_bits(snapshot(model), state)


def test_save_and_load_name_the_format(tmp_path: Path) -> None:
    model = adapted()
    lora.save(model, tmp_path)
    raw = (tmp_path / "adapter_model.safetensors").read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    (base,) = [json.loads(value) for value in metadata.values() if value.startswith('{"layout"')]
    assert base["quantisation"] == "int4 by row"
    with warnings.catch_warnings():
        warnings.simplefilter("error", lora.LoraWarning)
        loaded = lora.load(net(), tmp_path)
    assert torch.equal(loaded(random(5, 64)), model(random(5, 64)))
    plain = nn.Sequential(*[nn.Linear(m.in_features, m.out_features) if i % 2 == 0 else m for i, m in enumerate(net())])
    for i in (0, 2, 4):
        plain[i].weight.data = RowWeight(net()[i]).dense(torch.float32)
    with pytest.warns(lora.LoraWarning, match="in int4 by row, and this one is in float32, not quantized"):
        lora.load(plain, tmp_path)


@pytest.mark.filterwarnings("ignore:merge.*kept less than")
@pytest.mark.parametrize("into", [None, "int4"])
def test_merge_and_unmerge_to_the_bit(into: str | None) -> None:
    model = adapted()
    state, x, was = snapshot(model), random(5, 64), [(m, getattr(m, "weight", None)) for m in model]
    out = model(x)
    exact = {i: total(model, i) for i in (0, 4)}
    report = lora.merge(model, into=into, force=True)
    assert {m.quantized for m in report.modules} == {into}
    for i, values in exact.items():
        if into is None:
            assert type(model[i]) is nn.Linear
            assert torch.equal(model[i].weight, values.to(model[i].weight.dtype))
        else:
            assert type(model[i]).__name__ == "FrozenLinear[RowLinear]"
            assert same_bits(
                dict(zip("ab", quantize(values), strict=True)), {"a": model[i].weight, "b": model[i].scale}
            )
    twin = copy.deepcopy(model)
    lora.unmerge(model)
    lora.unmerge(twin)
    for each in (model, twin):
        assert same_bits(snapshot(each), state)
        assert torch.equal(each(x), out)
    assert all(module is before and getattr(module, "weight", None) is weight
               for module, (before, weight) in zip(model, was, strict=True))  # fmt: skip


def total(model: Any, i: int) -> Tensor:
    """W0 + D in fp32, D summed in float64."""
    host, own = model[i], dict(model.named_parameters())
    A, B = (own[f"{i}.lora.default.{half}"].double() for half in "AB")
    text = f"int4_rows:{host.out_features}x{host.in_features}"
    return dequantize([host.weight, host.scale], text, torch.float32) + (2 * B @ A).float()


def test_unload_leaves_plain_linears() -> None:
    model = adapted()
    lora.merge(model, unload=True)
    assert [type(model[i]) for i in (0, 2, 4)] == [nn.Linear, RowLinear, nn.Linear]
    assert sorted(model.state_dict()) == sorted([
        "0.weight", "0.bias", "2.weight", "2.bias", "2.scale", "4.weight", "4.bias"
    ])  # fmt: skip


def test_a_format_that_cannot_quantize_again_or_become_plain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    with pytest.raises(lora.LoraError, match="the weight of '0' is int4; allowed are 'int4' and None"):
        lora.merge(model, into="nf4")
    monkeypatch.setattr(RowWeight, "into", ())
    with pytest.raises(lora.LoraError, match=r"into: got 'int4'; allowed are None .*'nf4', 'fp4', 'int8'"):
        lora.merge(model, into="int4")
    with pytest.raises(lora.LoraError, match=r"is int4; allowed are None \(a 16-bit layer\)"):
        lora.merge(model, into="nf4")
    monkeypatch.setattr(RowWeight, "why_not_plain", lambda self: "is needed as it is")
    with pytest.raises(lora.LoraError, match="model: '0' is needed as it is; merge into the base loaded in 16 bits"):
        lora.merge(model)


def test_a_class_with_a_forward_of_its_own_is_left_alone_and_refused_as_a_target() -> None:
    model = nn.Sequential(net()[0], net(Shifted)[2])
    out = model(x := random(5, 64))
    lora.inject(model, r=4, targets=["0"])
    assert type(model[1]) is Shifted and torch.equal(model(x), out)
    with pytest.raises(lora.LoraError, match=r"Shifted, which has a forward of its own; .*stranger' RowLinear"):
        lora.inject(net(Shifted), r=4, targets=["0"])


def test_a_weight_that_is_not_ready_is_refused_by_its_formats_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: RowWeight) -> None:
        raise lora.LoraError("model: not packed yet")

    monkeypatch.setattr(RowWeight, "check", check)
    with pytest.raises(lora.LoraError, match="not packed yet"):
        lora.inject(net(), r=4, targets=["0"])
    with pytest.raises(lora.LoraError, match="not packed yet"):
        lora.prepare(net(), checkpointing=False)


def test_its_own_forward_runs_where_the_format_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted().eval()
    hosts: list[tuple[nn.Module, type[nn.Module]]] = []

    def own_forward(self: RowWeight, host: nn.Module, original: type[nn.Module], x: Tensor) -> Tensor:
        hosts.append((host, original))
        return torch.zeros(*x.shape[:-1], self.shape[0])

    monkeypatch.setattr(RowWeight, "runs_own_forward", lambda self, host, x: not torch.is_grad_enabled())
    monkeypatch.setattr(RowWeight, "own_forward", own_forward)
    model(random(5, 64))
    assert not hosts
    with torch.no_grad():
        model(random(5, 64))
    assert hosts == [(model[i], RowLinear) for i in (0, 2, 4)]


def test_whoever_trains_or_saves_the_model_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(RowWeight, "allow_training", lambda root, allowed: told.append(allowed))
    monkeypatch.setattr(RowWeight, "forget", lambda root, names: told.append(names))
    model = adapted()
    assert told == [True]
    lora.merge(model, unload=True)
    assert told == [True, False, ["0", "4"]]
