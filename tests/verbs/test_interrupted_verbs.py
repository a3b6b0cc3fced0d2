"""A verb that fails or is interrupted half-way leaves the model as it was."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize, same_bits, snapshot
from lora import activation
from lora.exact import Journal
from lora.layers import LinearAdapters, hosts, matrix, whole


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


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to an interrupt, also where the shell that started the tests has them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_interrupt_waits_until_the_first_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(lora.inject(net(), r=2, targets=["0", "1", "2"]))
    before, bits = state(model), snapshot(model)
    monkeypatch.setattr(matrix, "refresh", fails_at(3, matrix.refresh))
    real, presses = Journal.back, []

    def back(self: Journal) -> None:
        presses.append(len(self))
        signal.raise_signal(signal.SIGINT)
        real(self)

    monkeypatch.setattr(Journal, "back", back)
    with pytest.raises(KeyboardInterrupt):
        lora.merge(model)
    assert presses and presses[0] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert state(model) == before
    assert same_bits(snapshot(model), bits)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_while_disabled_is_left_comes_when_all_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(lora.inject(net(), r=2, targets=["0", "1", "2"]))
    lora.merge(model)
    before, bits = state(model), snapshot(model)
    block = lora.disabled(model)
    block.__enter__()
    real = matrix.refresh

    def interrupted(host: nn.Module) -> None:
        signal.raise_signal(signal.SIGINT)
        real(host)

    monkeypatch.setattr(matrix, "refresh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        block.__exit__(None, None, None)
    assert state(model) == before
    assert same_bits(snapshot(model), bits)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_that_waited_is_not_lost_where_the_verb_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(lora.inject(net(), r=2, targets=["0", "1", "2"]))
    lora.merge(model)
    block = lora.disabled(model)
    block.__enter__()
    next(hosts(model))[2]["default"].A.data.fill_(torch.inf)  # so that it cannot be merged again
    real = activation.acting

    def interrupted(root: nn.Module) -> list[str]:
        signal.raise_signal(signal.SIGINT)
        return real(root)

    monkeypatch.setattr(activation, "acting", interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        block.__exit__(None, None, None)
    assert isinstance(raised.value.__context__, lora.LoraError)
    assert [(a.active, a.undo) for _, _, a in hosts(model)] == [(("default",), None)] * 3


def test_a_whole_module_whose_values_were_exchanged_while_disabled_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(lora.inject(net(), r=2, targets=["0"], train=["1"]))
    lora.merge(model)
    before, bits = state(model), snapshot(model)
    block = lora.disabled(model)
    block.__enter__()
    monkeypatch.setattr(whole, "refresh", fails_at(1, whole.refresh))  # its values are exchanged by then
    with pytest.raises(KeyboardInterrupt):
        block.__exit__(None, None, None)
    assert state(model) == before
    assert same_bits(snapshot(model), bits)


def test_a_merge_that_no_longer_fits_after_disabled_leaves_its_adapters_acting() -> None:
    model = randomize(lora.inject(net(), r=2, targets=["0", "1", "2"]))
    lora.merge(model)
    with pytest.raises(lora.LoraError, match="NaN or infinity"), lora.disabled(model):
        next(hosts(model))[2]["default"].A.data.fill_(torch.inf)
    assert [(a.active, a.undo) for _, _, a in hosts(model)] == [(("default",), None)] * 3


def test_remove_idle_beside_merged_leaves_the_merge() -> None:
    model = net()
    plain = state(model)
    for name, targets in (("a", ["0", "1"]), ("b", ["1", "2"])):
        randomize(lora.inject(model, r=2, targets=targets, name=name))
    lora.merge(model)
    merged = {name: p for name, p in snapshot(model).items() if "lora" not in name}
    lora.remove(model, "a")
    assert [(name, a.active, a.undo is not None, list(a.records)) for name, _, a in hosts(model)] == [
        ("1", ("b",), True, ["b"]),
        ("2", ("b",), True, ["b"]),
    ]
    assert same_bits({name: p for name, p in snapshot(model).items() if "lora" not in name}, merged)
    lora.remove(model)
    assert state(model) == plain
    assert same_bits(snapshot(model), snapshot(net()))


def test_a_refused_inject_gives_the_random_numbers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    torch.manual_seed(3)
    monkeypatch.setattr("lora.injection.activate_all", fails_at(1, None))
    with pytest.raises(KeyboardInterrupt):
        lora.inject(model, r=2, targets=["0"])
    found = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(3))


@pytest.mark.parametrize("step", ["_checkpoint", "_cast"])
def test_an_interrupted_prepare_leaves_dtypes_hooks_and_checkpointing(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora import preparation

    class Model(nn.Module):
        gradient_checkpointing = False

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.lm_head = nn.LayerNorm(6), nn.Linear(6, 6)
            self.bfloat16()

        def gradient_checkpointing_enable(self, keywords: dict[str, Any]) -> None:
            self.gradient_checkpointing = True

    model, real = Model(), getattr(preparation, step)
    bits, before = snapshot(model), {name: dict(vars(m)) for name, m in model.named_modules()}

    def interrupted(*args: Any) -> None:
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        lora.prepare(model, norms_fp32=True, head_dtype=torch.float32)
    assert same_bits(snapshot(model), bits)
    assert {name: vars(m) for name, m in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("settings", [{"head_dtype": torch.float64}, {"norms_fp32": True}])
def test_an_interrupted_prepare_leaves_the_copies_that_do_not_act(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora import preparation

    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "LayerNorm": nn.LayerNorm(4), "lm_head": nn.Linear(4, 4)}).bfloat16()
    lora.inject(model, r=2, targets=["fc"], train=["LayerNorm", "lm_head"])
    lora.activate(model, None)
    before, real = snapshot(model), preparation._cast

    def interrupted(*args: Any) -> None:
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "_cast", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lora.prepare(model, checkpointing=False, **settings)
    assert same_bits(snapshot(model), before)
