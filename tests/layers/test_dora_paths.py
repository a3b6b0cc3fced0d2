"""DoRA through every way of running a linear: plain, the operator, groups, several at once, compiled, recomputed."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
from conftest import randomize, same_bits, snapshot, tiny_bert, tiny_llama
from dora_oracle import error, fill, leaves64, together64
from lora.layers import adapters_of, groups, hosts, plan

CALLS: list[int] = []


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused path, whose operator runs in plain torch here."""
    real = groups.fused_linear

    def counted(x: Tensor, weights: list[Tensor], *rest: Any, **keywords: Any) -> list[Tensor]:
        CALLS.append(len(weights))
        return real(x, weights, *rest, **keywords)

    monkeypatch.setattr(plan, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(plan, "DTYPES", (torch.float32,))
    monkeypatch.setattr(plan, "HAS_TRITON", True)
    monkeypatch.setattr(groups, "fused_linear", counted)
    CALLS.clear()


class Heads(nn.Module):
    """Three linears that are fed one tensor."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, n, bias) for n in (48, 24, 24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


NAMES = ["q_proj", "k_proj", "v_proj"]
X = torch.randn(19, 32, generator=torch.Generator().manual_seed(1))
DY = torch.randn(19, 96, generator=torch.Generator().manual_seed(2))


def matches_the_definition(model: nn.Module, heads: Heads) -> None:
    """Outputs and the gradient of every parameter."""
    model.zero_grad()
    got = model(X)
    got.backward(DY)
    wanted, leaves = [], {}
    for name in NAMES:
        host = getattr(heads, name)
        adapters = adapters_of(host)
        own = {} if adapters is None else {n: leaves64(adapters[n]) for n in adapters.active}
        W = host.weight.detach().double() if not own else together64(host, leaves=own)
        bias = None if host.bias is None else host.bias.detach().double()
        for part in own.values():
            bias = part.get("bias", bias)
        wanted.append(X.double() @ W.t() + (0 if bias is None else bias))
        leaves |= {f"{name}.lora.{n}.{key}": leaf for n, part in own.items() for key, leaf in part.items()}
    y = torch.cat(wanted, -1)
    y.backward(DY.double())
    assert error(got, y.detach()) < 1e-6
    found = {name: p.grad for name, p in heads.named_parameters() if p.grad is not None}
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert error(found[name], leaf.grad) < 2e-5, name


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_group_runs_together(on_a_device: None, has_bias: bool, bias: str) -> None:
    heads = Heads(has_bias)
    model = fill(lora.inject(nn.Sequential(heads), targets=NAMES, r=4, dora=True, bias=bias))
    matches_the_definition(model, heads)
    assert CALLS == [3]


def test_one_alone(on_a_device: None) -> None:
    heads = Heads()
    matches_the_definition(fill(lora.inject(nn.Sequential(heads), targets=["k_proj"], r=4, dora=True)), heads)
    assert CALLS == [1]


def test_a_group_of_dora_and_plain_members(on_a_device: None) -> None:
    heads = Heads()
    model = lora.inject(nn.Sequential(heads), targets=["q_proj", "v_proj"], r=4, dora=True, name="d")
    lora.inject(fill(model), targets=["k_proj"], r=3, name="p")
    fill(model, seed=2)
    lora.activate(model, ["d", "p"])
    for _ in range(2):  # the two that scale run together, once, though the other one is asked between them
        matches_the_definition(model, heads)
        assert CALLS == [2, 1]
        group = adapters_of(heads.k_proj).group
        assert group is not None and not group.ready
        CALLS.clear()


@pytest.mark.parametrize("names", [["d", "e"], ["d", "p"], ["p", "d", "e"], ["e", "p", "d"]], ids=str)
@pytest.mark.parametrize("device", [True, False])
def test_several_at_once_add_their_changes(device: bool, names: list[str], request: pytest.FixtureRequest) -> None:
    if device:
        request.getfixturevalue("on_a_device")
    heads = Heads()
    model: nn.Module = nn.Sequential(heads)
    for i, (name, update) in enumerate({"d": "dora", "p": "lora", "e": "dora"}.items()):
        fill(lora.inject(model, targets=NAMES, r=2 + i, name=name, update=update), seed=i)
    lora.activate(model, names)
    matches_the_definition(model, heads)


def test_the_order_of_the_adapters_does_not_matter() -> None:
    model = nn.Sequential(Heads())
    for i, (name, update) in enumerate({"d": "dora", "p": "lora", "e": "dora"}.items()):
        fill(lora.inject(model, targets=NAMES, r=2 + i, name=name, update=update), seed=i)
    lora.activate(model, ["d", "p", "e"])
    want = model(X)
    lora.activate(model, ["e", "d", "p"])
    torch.testing.assert_close(model(X), want)


def test_trained_biases_of_two_adapters_add() -> None:
    heads = Heads()
    model: nn.Module = nn.Sequential(heads)
    for i, name in enumerate("de"):
        fill(lora.inject(model, targets=["q_proj"], r=2, name=name, dora=True, bias="lora_only"), seed=i)
    lora.activate(model, ["d", "e"])
    host = heads.q_proj
    parts = adapters_of(host)
    bias = parts["d"].bias.double() + parts["e"].bias.double() - host.bias.double()
    exact = X.double() @ together64(host).t() + bias
    assert error(heads.q_proj(X), exact.detach()) < 1e-6


@pytest.mark.parametrize("device", [True, False])
def test_dropout_follows_the_seed_and_differs_between_calls(device: bool, request: pytest.FixtureRequest) -> None:
    if device:
        request.getfixturevalue("on_a_device")
    model = fill(lora.inject(nn.Sequential(Heads()), targets=NAMES, dora=True, dropout=0.5)).train()
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(model(X))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    mean = torch.stack([model(X).detach() for _ in range(4000)]).mean(0)
    assert error(mean, model.eval()(X).detach().double()) < 0.02


def test_a_fresh_adapter_changes_no_bit_on_the_device(on_a_device: None) -> None:
    """Of the operator's own products, which a base without adapters does not run through."""
    heads = Heads()
    model = lora.inject(nn.Sequential(heads), targets=NAMES, name="p")
    for _, _, adapters in hosts(model):
        adapters["p"].B.data.zero_()
    want = model(X)
    lora.inject(model, targets=NAMES, name="d", dora=True)
    assert torch.equal(model(X), want)


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and any(name.endswith("magnitude") for name in found)
    for name, value in wanted.items():
        assert error(found[name], value.double()) < 1e-5, name


@pytest.mark.parametrize("device", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(
    reentrant: bool, device: bool, ids: Tensor, request: pytest.FixtureRequest
) -> None:  # fmt: skip
    if device:
        request.getfixturevalue("on_a_device")
    model: Any = fill(lora.inject(tiny_llama(), r=4, targets="all-linear", dora=True, dropout=0.3), 0.05).train()
    want = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    same(gradients(model, ids), want)


@pytest.mark.parametrize("device", [True, False])
def test_compiles_to_one_graph(device: bool, ids: Tensor, request: pytest.FixtureRequest) -> None:
    if device:
        request.getfixturevalue("on_a_device")
    model = fill(lora.inject(tiny_llama(), r=4, targets="all-linear", dora=True), 0.05).train()
    want = gradients(model, ids)
    torch._dynamo.reset()
    same(gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), ids), want)


@pytest.mark.parametrize("kind", ["one", "several"])
def test_autocast_computes_in_its_dtype(kind: str) -> None:
    heads = Heads()
    model: nn.Module = nn.Sequential(heads)
    for name in ["d", "e"][: 1 + (kind == "several")]:
        fill(lora.inject(model, targets=NAMES, dora=True, name=name))
    lora.activate(model, ["d", "e"][: 1 + (kind == "several")])
    want = model(X).detach()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(X)
    assert got.dtype == torch.bfloat16
    assert 1e-4 < error(got, want.double()) < 2e-2
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_activate_disable_and_remove(ids: Tensor) -> None:
    model = tiny_bert()
    base, before = model(ids).logits, snapshot(model)
    fill(lora.inject(model, targets=["query", "value"], dora=True, bias="lora_only"))
    acting = model(ids).logits
    assert not torch.equal(acting, base)
    with lora.disabled(model):
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, acting)
    lora.inject(model, targets=["query"], name="other")
    lora.activate(model, "default")
    assert torch.equal(model(ids).logits, acting)
    lora.remove(model)
    assert torch.equal(model(ids).logits, base) and same_bits(snapshot(model), before)


def test_copies_and_files_of_torch_keep_what_acts(ids: Tensor) -> None:
    model = fill(lora.inject(tiny_llama(), targets="all-linear", dora=True), 0.05)
    want, buffer = model(ids).logits, io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(ids).logits, want)
        assert type(adapters_of(twin.model.layers[0].self_attn.q_proj)["default"]).__name__ == "DoRA"
    other = lora.inject(tiny_llama(), targets="all-linear", dora=True)
    state = model.state_dict()
    assert state["model.layers.0.self_attn.q_proj.lora.default.magnitude"].shape == (48,)
    other.load_state_dict(state)
    assert torch.equal(other(ids).logits, want)


def test_training_lowers_the_loss_and_moves_every_parameter(ids: Tensor) -> None:
    model: Any = lora.prepare(randomize(lora.inject(tiny_llama(), r=4, targets="all-linear", dora=True), 0.0)).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())
    assert all(not torch.equal(now[n], p) for n, p in trained.items())
    assert "checkpointing" in lora.summary(model).prepared


def test_a_linear_of_its_own_under_checkpoint_repeats_to_the_bit() -> None:
    model = fill(lora.inject(nn.Sequential(Heads()), targets=NAMES, dora=True, dropout=0.2)).train()
    found = []
    for run in (lambda: model(X), lambda: checkpoint(model, X, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(3)
        run().backward(DY)
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
