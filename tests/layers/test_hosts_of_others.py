"""Hosts whose class or forward somebody else changed, before or after they had adapters."""

import copy
import gc
import pickle
import weakref
from typing import Any

import accelerate
import pytest
import torch
import torch._dynamo.testing
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import lora
from classes_of_others import Doubled, Halved, Marked, X, adapt, build, halve_extra, over_its_own, to_class
from conftest import same_bits, snapshot
from lora import LoraError
from lora.layers import adapters_of, host

BEFORE = [
    pytest.param(lambda module: None, {"targets": ["first"]}, id="class"),
    pytest.param(halve_extra, {"targets": ["first"]}, id="parametrized"),
    pytest.param(halve_extra, {"targets": ["last"], "train": ["first"]}, id="parametrized, trained whole"),
]
AFTER = [
    pytest.param(to_class(Doubled), {"targets": ["first"]}, id="class with a forward"),
    pytest.param(over_its_own, {"targets": ["first"]}, id="class over ours"),
    pytest.param(over_its_own, {"targets": ["last"], "train": ["first"]}, id="class over a copied module's"),
    pytest.param(halve_extra, {"targets": ["first"]}, id="parametrized"),
]


def values(module: nn.Module) -> list[Tensor]:
    """What a module gives with each of its adapters, both where they may act at once, and with none, acting last."""
    chosen: list[Any] = ["b", None, "a"]
    if not isinstance(module[0], nn.Linear) or not hasattr(adapters_of(module[0])["a"], "module"):
        chosen.insert(0, ["a", "b"])
    found = []
    for names in chosen:
        lora.activate(module, names)
        found.append(module(X).detach())
    return found


@pytest.mark.parametrize(("change", "settings"), BEFORE)
def test_a_class_found_is_kept_while_adapters_act_and_given_back(change: Any, settings: dict[str, Any]) -> None:
    model = build(Marked)
    change(model[0])
    cls, base, state = type(model[0]), model(X), snapshot(model)
    adapt(model, settings)
    out = model(X)
    assert isinstance(model[0], cls) and not torch.allclose(out, base)
    lora.activate(model, None)
    assert type(model[0]) is cls and torch.equal(model(X), base)
    lora.activate(model, "a")
    assert torch.equal(model(X), out)
    with lora.disabled(model):
        assert type(model[0]) is cls and torch.equal(model(X), base)
    lora.merge(model)
    assert type(model[0]) is cls
    torch.testing.assert_close(model(X), out)
    lora.unmerge(model)
    assert isinstance(model[0], cls) and torch.equal(model(X), out)
    lora.remove(model)
    assert type(model[0]) is cls and torch.equal(model(X), base)
    assert same_bits(snapshot(model), state)


@pytest.mark.parametrize(("change", "settings"), AFTER)
def test_a_class_given_meanwhile_is_kept_and_found_again(change: Any, settings: dict[str, Any]) -> None:
    """Every way to act gives what it gives on a twin where the change came last."""
    cls = Marked if change is halve_extra else nn.Linear
    model = adapt(build(cls), settings)
    change(model[0])
    mark = getattr(model[0], "mark", None)
    found = values(model)
    for names, out in zip([["a", "b"], "b", None, "a"][-len(found) :], found, strict=True):
        twin = adapt(build(cls), settings)
        lora.activate(twin, names)
        change(twin[0])
        if isinstance(twin[0], Doubled):  # the user threw our class away, until the next verb
            lora.activate(twin, names)
        assert torch.equal(twin(X), out), names
    checked = checkpoint(model, X, use_reentrant=False)
    assert torch.equal(checked, found[-1])
    classes: set[int] = set()
    for _ in range(3):  # and back and forth they are the same classes, so that compiled code stays valid
        for names in ("b", None, "a"):
            lora.activate(model, names)
            gc.collect()
            classes.add(id(type(model[0])))
    assert len(classes) == 2
    with lora.disabled(model):
        assert torch.equal(model(X), found[-2])
        assert isinstance(model[0], nn.Linear) and getattr(model[0], "mark", None) == mark
    assert torch.equal(model(X), found[-1])
    twin = copy.deepcopy(model)
    assert type(twin[0]) is type(model[0]) and torch.equal(twin(X), found[-1])
    lora.remove(model)
    assert getattr(model[0], "mark", None) == mark and adapters_of(model[0]) is None
    assert not isinstance(model[0], host.LoraLayer)
    assert torch.equal(model(X), found[-2])


def test_the_very_class_comes_back_that_somebody_gave_the_host() -> None:
    model = adapt(build(), {"targets": ["first"]})
    model[0].__class__ = Doubled
    for names in ("a", None, "b", None):
        lora.activate(model, names)
        assert (type(model[0]) is Doubled) == (names is None)
    lora.activate(model, "a")
    assert model[0].size == 36 and torch.equal(model[0](X, times=4.0), 2 * model[0](X))
    lora.remove(model)
    assert type(model[0]) is Doubled
    assert torch.equal(model[0](X), 2 * build()[0](X))


def test_hosts_of_importable_classes_are_pickled_as_they_are() -> None:
    model = adapt(build(), {"targets": ["first"], "train": ["norm"]})
    model[0].__class__ = Doubled
    for names in (None, "a", "b"):
        lora.activate(model, names)
        again = pickle.loads(pickle.dumps(model))
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(again(X), model(X))
        lora.remove(again)
        assert [type(m) for m in again] == [Doubled, nn.LayerNorm, nn.Linear]


def test_a_parametrized_weight_is_refused_and_a_copied_modules_cannot_be_parametrized_while_it_acts() -> None:
    for name in ("weight", "bias"):
        model = build()
        parametrize.register_parametrization(model[0], name, Halved())
        with pytest.raises(LoraError, match=f"the {name} of 'first' is computed from other parameters"):
            lora.inject(model, r=2, targets=["first"])
    model = adapt(build(), {"targets": ["last"], "train": ["first"]})
    out = model(X)
    with pytest.raises(LoraError, match="model: 'weight' of a module that an adapter trains cannot be taken away"):
        parametrize.register_parametrization(model[0], "weight", Halved())
    assert torch.equal(model(X), out)


class Added(ModelHook):
    """accelerate's kind of hook, which replaces the forward on the instance."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output + 1


@pytest.mark.parametrize("first", [True, False], ids=["hook first", "adapter first"])
@pytest.mark.parametrize(
    "settings", [{"targets": ["first"]}, {"targets": ["last"], "train": ["first"]}], ids=["target", "whole"]
)
def test_accelerates_hooks_see_what_acts_and_come_off(first: bool, settings: dict[str, Any]) -> None:
    model = build()
    plain = adapt(build(), settings)
    if first:
        add_hook_to_module(model[0], Added())
    adapt(model, settings)
    if not first:
        add_hook_to_module(model[0], Added())
    for names in ("b", None, "a"):
        for each in (model, plain):
            lora.activate(each, names)
        assert torch.equal(model[0](X), plain[0](X) + 1)
    with lora.disabled(model):
        assert torch.equal(model[0](X), build()[0](X) + 1)
    lora.merge(model)
    torch.testing.assert_close(model[0](X), plain[0](X) + 1)
    lora.unmerge(model)
    assert torch.equal(model[0](X), plain[0](X) + 1)
    lora.remove(model)
    assert type(model[0]) is nn.Linear and torch.equal(model[0](X), build()[0](X) + 1)
    remove_hook_from_module(model[0])
    assert torch.equal(model[0](X), build()[0](X))


@pytest.mark.parametrize(
    "settings", [{"targets": ["first"]}, {"targets": ["last"], "train": ["first"]}], ids=["target", "whole"]
)
def test_a_host_that_accelerate_offloads_computes_the_same(settings: dict[str, Any]) -> None:
    model, plain = (adapt(build(), settings) for _ in range(2))
    with torch.no_grad():
        model[0]._parameters["weight"].mul_(2)  # not the copy's
        plain[0]._parameters["weight"].mul_(2)
    state = snapshot(model)
    add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu", offload=True, place_submodules=True))
    for names in ("b", None, "a"):
        for each in (model, plain):
            lora.activate(each, names)
        assert model[0]._parameters["weight"].is_meta
        with torch.no_grad():
            assert torch.equal(model(X), plain(X))
    remove_hook_from_module(model[0])
    assert same_bits(snapshot(model), state)


@pytest.mark.parametrize(
    ("change", "after"),
    [(halve_extra, False), (over_its_own, True), (to_class(Doubled), True)],
    ids=["parametrized", "over", "class"],
)
def test_classes_go_with_their_modules(change: Any, after: bool) -> None:
    """Each parametrized module has a class of its own: they must not pile up."""
    seen: list[weakref.ref[type]] = []

    def once() -> None:
        model = build(Marked if change is halve_extra else nn.Linear)
        if not after:
            change(model[0])
        lora.inject(model, r=2, targets=["first"])
        if after:
            change(model[0])
        for names in (None, "default"):
            lora.activate(model, names)
            seen.append(weakref.ref(type(model[0])))
        lora.remove(model)
        seen.append(weakref.ref(type(model[0])))

    def collect() -> None:
        for _ in range(4):  # a class that goes lets go of another
            gc.collect()

    once()
    collect()
    left = len(host._CLASSES), len(host._OVER)
    for _ in range(3):
        once()
    collect()
    assert (len(host._CLASSES), len(host._OVER)) == left
    assert {cls() for cls in seen} <= {None, Doubled, Marked}


def test_switching_compiles_nothing_again() -> None:
    torch._dynamo.reset()
    model = adapt(build(), {"targets": ["first"], "train": ["norm"]})
    over_its_own(model[0])
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)

    def around() -> None:
        for names in ("a", "b", None):
            lora.activate(model, names)
            assert torch.allclose(compiled(X), model(X))
            gc.collect()  # takes the classes that nobody keeps

    around()
    first = counter.frame_count
    around()
    around()
    assert counter.frame_count == first


@pytest.mark.parametrize("target", ["0", "1"])
def test_an_adapter_whose_values_were_offloaded_is_refused_and_not_read(target: str) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    lora.inject(model, r=2, targets=[target])
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(LoraError, match="A and B are on the meta device"):
        model(torch.arange(3))
