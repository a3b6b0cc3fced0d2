"""merge: all or nothing, and what is refused before the first write."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize, tiny_bert, unchanged
from lora.bases import Dense
from lora.layers.host import adapters_of
from two_kinds import TwoKinds, merge, merged_model, scale_updates


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


def test_unload_with_an_idle_adapter_is_refused() -> None:
    model = TwoKinds()
    lora.inject(model, targets=["linear"], name="a")
    lora.inject(model, targets=["linear"], name="b")
    with unchanged(model), pytest.raises(lora.LoraError, match=r"\ba\b"):
        lora.merge(model, unload=True)


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
