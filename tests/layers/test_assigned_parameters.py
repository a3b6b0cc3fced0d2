"""A parameter that is exchanged while an adapter's copy of its module acts."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize, refused, same_bits, snapshot, state_of
from lora.layers import adapters_of

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Table(nn.Module):
    """Parameters of its own names."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.offset_bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.offset_bias


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norms = nn.ModuleList([nn.LayerNorm(4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](self.fc(x))


def build() -> Any:
    torch.manual_seed(0)
    names = ["lin", "fc1", "table", "block"]
    return nn.Sequential(OrderedDict(zip(names, (nn.Linear(4, 4), nn.Linear(4, 4), Table(), Block()), strict=True)))


def adapted(**settings: Any) -> Any:
    return randomize(lora.inject(build(), r=2, targets=["lin"], **settings))


def fresh(like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.full_like(like, 3.0))


PLACES = [
    ({"train": ["fc1"]}, "fc1", "weight"),
    ({"train": ["fc1"]}, "fc1", "bias"),
    ({"bias": "all"}, "fc1", "bias"),
    ({"train": ["table"]}, "table", "gain"),
    ({"bias": "all"}, "table", "offset_bias"),
]
WAYS: list[Callable[[nn.Module, str, nn.Parameter], None]] = [
    setattr,
    lambda module, name, parameter: module.register_parameter(name, parameter),
]
places = pytest.mark.parametrize(("settings", "owner", "name"), PLACES)


@places
@pytest.mark.parametrize("put", WAYS, ids=["assigned", "registered"])
def test_it_lands_in_what_acts_and_the_base_comes_back(
    settings: dict[str, Any], owner: str, name: str, put: Any, tmp_path: Path
) -> None:
    model = adapted(**settings)
    base, keys = snapshot(build()), list(model.state_dict())
    host = model.get_submodule(owner)
    value = fresh(getattr(host, name))
    put(host, name, value)
    assert getattr(host, name) is value
    assert sum(p is value for p in model.parameters()) == 1 and value.requires_grad
    assert list(model.state_dict()) == keys
    x = X.clone()
    plain = build().get_submodule(owner)
    own = adapters_of(host)["default"].module
    plain.load_state_dict({n: getattr(own, n).detach() for n, _ in plain.named_parameters()})
    assert torch.equal(host(x), plain(x)) and torch.equal(getattr(plain, name), value)
    (model.lin(x) + host(x)).sum().backward()
    assert value.grad is not None and value.grad.abs().sum() > 0
    lora.save(model, tmp_path)
    assert torch.equal(lora.load(build(), tmp_path).get_submodule(owner)(x), host(x))
    lora.remove(model)
    assert same_bits(snapshot(model), base)


@places
@pytest.mark.parametrize(
    "take",
    [
        lambda module, name: setattr(module, name, None),
        delattr,
        lambda module, name: module.register_parameter(name, None),
    ],
    ids=["None", "del", "registered None"],
)
def test_it_cannot_be_taken_away(settings: dict[str, Any], owner: str, name: str, take: Any) -> None:
    model = adapted(**settings)
    refused(lambda: take(model.get_submodule(owner), name), model, f"model: '{name}' of a module that an adapter")
    lora.activate(model, None)
    take(model.get_submodule(owner), name)  # the base's, as without an adapter


def test_what_does_not_train_is_exchanged_in_the_base_as_well() -> None:
    model = adapted(bias="all")
    host, value = model.fc1, fresh(model.fc1.weight)
    host.weight = value
    assert torch.equal(host(X), nn.functional.linear(X, value, host.bias))
    lora.activate(model, None)
    assert host.weight is value and torch.equal(host(X), nn.functional.linear(X, value, host.bias))


@places
def test_at_rest_it_goes_to_the_base(settings: dict[str, Any], owner: str, name: str) -> None:
    model = adapted(**settings)
    host = model.get_submodule(owner)
    acting = getattr(host, name)
    lora.activate(model, None)
    value = fresh(acting)
    setattr(host, name, value)
    assert host._parameters[name] is value and getattr(host, name) is value
    lora.activate(model, "default")
    assert getattr(host, name) is acting


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("settings", [{"train": ["fc1", "table", "block"]}, {"bias": "all"}], ids=["train", "bias"])
def test_load_state_dict_loads_the_base(settings: dict[str, Any], assign: bool) -> None:
    model = adapted(**settings)
    out = model(X)
    base = {key: value + 1 for key, value in snapshot(build()).items()}
    model.load_state_dict(base, strict=False, assign=assign)
    own = snapshot(model)
    assert all(torch.equal(own[key], value) for key, value in base.items())
    if "train" in settings:
        assert torch.equal(model.fc1(X), lora_free(model.fc1, own, "fc1.lora.default.module.")(X))
    lora.remove(model)
    assert same_bits(snapshot(model), base)
    assert not torch.equal(model(X), out)


def lora_free(host: Any, state: dict[str, Tensor], prefix: str) -> nn.Module:
    plain = nn.Linear(4, 4)
    plain.load_state_dict({n: state[prefix + n] for n in ("weight", "bias")})
    return plain


INNER: list[tuple[str, str]] = [("block.fc", "weight"), ("block.fc", "bias"), ("block.norms.0", "weight")]


@pytest.mark.parametrize(("owner", "name"), INNER)
@pytest.mark.parametrize(
    "put", [*WAYS, lambda m, n, p: delattr(m, n), lambda m, n, p: setattr(m, n, None)],
    ids=["assigned", "registered", "deleted", "None"],
)  # fmt: skip
def test_inside_a_module_trained_whole_it_is_refused_while_the_copy_acts(owner: str, name: str, put: Any) -> None:
    model = adapted(train=["block"])
    inner = model.get_submodule(owner)
    value = fresh(getattr(inner, name))
    refused(lambda: put(inner, name, value), model, f"'{name}' cannot be exchanged in a module that does not run")
    lora.activate(model, None)
    assert type(inner) in (nn.Linear, nn.LayerNorm)
    put(inner, name, value)
    assert inner._parameters.get(name) in (value, None)


def test_modules_inside_have_their_own_classes_wherever_no_copy_acts() -> None:
    model = build()
    classes, state = [type(m) for m in model.modules()], snapshot(model)
    lora.inject(model, r=2, targets=["lin"], train=["block"])
    acting = state_of(model)
    assert isinstance(model.block.fc, nn.Linear) and type(model.block.fc) is not nn.Linear
    lora.inject(model, r=2, targets=["lin"], train=["block"], name="b")
    assert {type(m) for m in adapters_of(model.block)["b"].module.modules()} == {
        type(m) for m in build().block.modules()
    }
    lora.activate(model, "default")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    lora.merge(model)
    assert type(model.block.fc) is nn.Linear
    lora.unmerge(model)
    with lora.disabled(model):
        assert type(model.block.fc) is nn.Linear
    lora.remove(model, "b")
    assert state_of(model) == acting
    lora.remove(model)
    assert [type(m) for m in model.modules()] == classes and same_bits(snapshot(model), state)


def test_other_attributes_and_new_parameters_go_where_they_always_do() -> None:
    model = adapted(train=["fc1", "block"])
    for module in (model.fc1, model.block.fc):
        module.note, module.extra = "a note", nn.Parameter(torch.ones(1))
        assert module.note == "a note" and module._parameters["extra"] is module.extra
        del module.note
        assert not hasattr(module, "note")
    del model.fc1.extra
    assert not hasattr(model.fc1, "extra")


def test_compiled_code_reads_what_acts() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) @ self.head.weight + self.head.bias

    torch._dynamo.reset()
    model = randomize(lora.inject(Tied(), r=2, targets=["lin"], train=["head"]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))
    model.head.weight = fresh(model.head.weight)
    assert torch.equal(compiled(X), model(X))
