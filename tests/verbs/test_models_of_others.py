"""Models as other people build them: shared, wrapped, compiled, parametrized and oddly named."""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lora
from conftest import randomize, same_bits, snapshot
from lora import LoraError, LoraWarning
from lora.layers import hosts
from small_net import Net, X, acts, original


def test_an_attribute_named_lora_is_refused_not_overwritten() -> None:
    for which in ({"targets": ["0"]}, {"targets": ["1"], "train": ["norm"]}, {"targets": ["1"], "bias": "all"}):
        for value in ("mine", nn.Linear(2, 2), nn.Parameter(torch.zeros(2))):
            model = Net()
            (model.layers[0] if which["targets"] == ["0"] else model.norm).lora = value
            before = original(model)
            with pytest.raises(LoraError, match="`lora`"):
                lora.inject(model, **which)
            assert original(model) == before


def test_a_class_that_cannot_be_subclassed_leaves_the_model_whole() -> None:
    class Final(nn.Linear):
        def __init_subclass__(cls, **keywords: object) -> None:
            raise TypeError("this class is final")

    model = nn.Sequential(nn.Linear(6, 6), Final(6, 6))
    before = original(model)
    with pytest.raises((LoraError, TypeError)):
        lora.inject(model, targets=["0", "1"])
    assert original(model) == before


def test_a_shared_module_is_found_by_either_name() -> None:
    for target in ("first", "second"):
        model = nn.ModuleDict({"first": nn.Linear(6, 6)})
        model["second"] = model["first"]
        lora.inject(model, targets=[target])
        assert len(list(hosts(model))) == 1


def test_lazy_and_scripted_modules_are_refused_in_words() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(LoraError, match="0"):
        lora.inject(model, targets=["0"])
    with pytest.raises(LoraError):
        lora.inject(torch.jit.script(nn.Sequential(nn.Linear(4, 4))), targets=["0"])


def test_an_uncalled_linear_of_multihead_attention_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.raises(LoraError, match="MultiheadAttention"):
        lora.inject(model, targets=["out_proj"])
    with pytest.warns(LoraWarning, match=r"leaves out out_proj \(1\) in MultiheadAttention"):
        lora.inject(model, targets="all-linear")
    assert [n for n, _, _ in hosts(model)] == ["1"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (2, 3, 4, 6)], ids=str)
def test_inputs_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    lora.inject(model, r=2, targets="all-linear")
    randomize(model)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = model(x)
    assert y.shape == (*shape[:-1], 3)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    flat = model(x.reshape(-1, 6)).view_as(y)
    torch.testing.assert_close(y, flat, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_non_contiguous_weights_and_inputs() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].weight = nn.Parameter(torch.randn(6, 12)[:, ::2])
    assert not model[0].weight.is_contiguous()
    storage = model[0].weight.untyped_storage()
    around = torch.as_strided(model[0].weight.data, (72,), (1,)).clone()
    before = snapshot(model)
    lora.inject(model, targets=["0"])
    randomize(model)
    x = torch.randn(6, 9).t()
    update = model[0].lora["default"]
    wanted = nn.functional.linear(x.double(), before["0.weight"].double(), before["0.bias"].double())
    wanted = wanted + update.scaling * x.double() @ update.A.double().t() @ update.B.double().t()
    torch.testing.assert_close(model(x).double(), wanted, rtol=1e-5, atol=1e-6)
    lora.merge(model)
    torch.testing.assert_close(model(x).double(), wanted, rtol=1e-5, atol=1e-6)
    assert model[0].weight.untyped_storage().data_ptr() == storage.data_ptr()
    lora.unmerge(model)
    lora.remove(model)
    assert same_bits(snapshot(model), before)
    assert torch.equal(torch.as_strided(model[0].weight.data, (72,), (1,)), around)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_wrapped_models_are_seen_through(wrap: Callable, tmp_path: Path) -> None:
    inner = Net()
    if wrap is nn.DataParallel:
        before = original(inner)
        with pytest.raises(LoraError, match="add them, then wrap it"):
            lora.inject(wrap(inner), r=2, targets=["0", "head"])
        model = wrap(lora.inject(inner, r=2, targets=["0", "head"]))
    else:
        model = wrap(inner)
        before = original(inner)
        assert lora.inject(model, r=2, targets=["0", "head"]) is model
    randomize(inner)
    lora.save(model, tmp_path)
    lora.merge(model)
    assert lora.summary(model).merged
    with lora.disabled(model):
        assert same_bits({k: v for k, v in snapshot(inner).items() if ".lora." not in k}, snapshot(Net()))
    lora.unmerge(model)
    lora.activate(model, None)
    lora.remove(model)
    assert original(inner) == before
    lora.load(inner, tmp_path)  # names without the wrapper's prefix
    assert [n for n, _, _ in hosts(inner)] == ["layers.0", "head"]


def test_a_compiled_module_within_keeps_plain_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[0] = torch.compile(model[0])
    plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with contextlib.suppress(LoraError):  # a refusal that names the reason is fine too
        lora.inject(model, targets="all-linear")
        lora.save(model, tmp_path)
        lora.load(plain, tmp_path, check=False)
        assert [n for n, _, _ in hosts(plain)] == ["0", "1"]


def test_adapters_may_be_called_as_they_like() -> None:
    model = Net()
    before = original(model)
    names = [
        "forward",
        "train",
        "active",
        "terms",
        "records",
        "undo",
        "original",
        "A",
        "lora",
        "weight",
        "0",
        "-",
        "__init__",
    ]
    for name in names:
        lora.inject(model, r=1, targets=["0"], name=name)
        randomize(model)
    lora.activate(model, names)
    assert acts(model, X)
    with tempfile.TemporaryDirectory() as folder:
        lora.save(model, folder)
        lora.remove(model)
        for name in names:
            lora.load(model, Path(folder) / name, name)
    lora.activate(model, names)
    lora.merge(model)
    lora.remove(model)
    assert original(model) == before


def test_parametrized_linear_computes_or_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    before = model(X)
    with contextlib.suppress(LoraError):
        lora.inject(model, targets=["0"])
        assert torch.equal(model(X), before)
        assert acts(model, X)
        lora.remove(model)
        nn.utils.parametrize.remove_parametrizations(model[0], "weight")
        torch.testing.assert_close(model(X), before)


def test_inject_under_inference_mode_is_refused_or_trains() -> None:
    model = Net()
    with contextlib.suppress(LoraError):
        with torch.inference_mode():
            lora.inject(model, targets=["0"])
        assert acts(model, X)
