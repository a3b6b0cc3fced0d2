"""A verb that fails or is interrupted half-way leaves the model as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize, same_bits, snapshot
from lora.layers import LinearAdapters, hosts, matrix


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))


def fails_at(number: int, real: Any) -> Any:
    """`real`, but for the call of that number, which is interrupted; later ones are not."""
    calls = []

    def call(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    return call


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "classes": [type(module) for module in model.modules()],
        "trainable": [n for n, p in model.named_parameters() if p.requires_grad],
        "hosts": [(name, a.active, a.undo is not None, list(a.records)) for name, _, a in hosts(model)],
    }


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("back", [False, True])
def test_a_merge_interrupted_after_a_weight_was_written(
    number: int, back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomize(lora.inject(net(), r=2, targets=["0", "1", "2"]))
    if back:
        lora.merge(model)
    before, bits = state(model), snapshot(model)
    monkeypatch.setattr(matrix, "refresh", fails_at(number, matrix.refresh))
    with pytest.raises(KeyboardInterrupt):
        (lora.unmerge if back else lora.merge)(model)
    assert state(model) == before
    assert same_bits(snapshot(model), bits)


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("step", ["attach", "settle", "activate_all", "arrange"])
def test_an_inject_interrupted_half_way(step: str, others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    if others:
        randomize(lora.inject(model, r=2, targets=["0", "2"], name="other"))
    before, bits = state(model), snapshot(model)
    if step == "arrange":
        monkeypatch.setattr(LinearAdapters, "arrange", classmethod(fails_at(1, None)))
    else:
        monkeypatch.setattr(f"lora.injection.{step}", fails_at(2 if step == "attach" else 1, getattr_of(step)))
    with pytest.raises(KeyboardInterrupt):
        lora.inject(model, r=2, targets=["0", "1"], name="new")
    assert state(model) == before
    assert same_bits(snapshot(model), bits)


def getattr_of(step: str) -> Any:
    from lora import injection

    return getattr(injection, step)


def test_the_last_adapter_removed_within_disabled_of_a_merge_into_its_code() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    lora.inject(model, r=2, targets=["0"])
    x: Tensor = torch.randn(2, 64)
    model.train()
    base = model(x)
    randomize(model)
    lora.merge(model, into="nf4", force=True)
    with lora.disabled(model):
        lora.remove(model)
    assert type(model[0]) is bnb.nn.Linear4bit
    lora.inject(model, r=2, targets=["0"])
    assert torch.equal(model(x), base)
