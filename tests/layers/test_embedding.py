"""Adapters of nn.Embedding against the definition: lookups, gradients, and what a table may be asked."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import refused, same_bits, snapshot
from dora_oracle import error, fill, leaves64, together64
from lora.layers import adapters_of, hosts

SHAPES = {"0-D": (), "1-D": (9,), "2-D": (3, 7), "3-D": (2, 3, 4), "none": (0,), "none of 5": (5, 0)}
UPDATES = pytest.mark.parametrize("update", ["lora", "dora"])


def table(dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(41, 24, **settings)).to(dtype)


def adapted(update: str = "lora", dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Sequential:
    return fill(lora.inject(table(dtype, **settings), targets=["0"], r=4, update=update))


def ids_of(shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, 41, shape, generator=torch.Generator().manual_seed(4), dtype=dtype)


@UPDATES
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_rows_and_gradients_follow_the_definition(shape: str, ids_dtype: torch.dtype, update: str) -> None:
    model = adapted(update)
    ids, part = ids_of(SHAPES[shape], ids_dtype), adapters_of(model[0])["default"]
    dy = torch.randn(*ids.shape, 24, generator=torch.Generator().manual_seed(5))
    own = leaves64(part)
    exact = together64(model[0], leaves={"default": own}).t()[ids.long()]
    exact.backward(dy.double())
    y = model(ids)
    y.backward(dy)
    assert y.shape == (*ids.shape, 24)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    for name, leaf in own.items():
        torch.testing.assert_close(getattr(part, name).grad.double(), leaf.grad, rtol=1e-5, atol=1e-5)


@UPDATES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_tables_are_within_twice_plain_torchs_error(dtype: torch.dtype, update: str) -> None:
    model = adapted(update, dtype)
    ids, part = ids_of((64,)), adapters_of(model[0])["default"]
    exact = together64(model[0]).detach().t()[ids]
    plain = model[0].weight[ids] + part.scaling * part.A.t()[ids].to(dtype) @ part.B.t().to(dtype)
    if update == "dora":
        norm = (model[0].weight.t() + part.scaling * (part.B @ part.A).to(dtype)).norm(dim=1)
        plain = plain * (part.magnitude.to(dtype) / norm)
    y = model(ids)
    assert y.dtype == dtype
    assert error(y, exact) <= 2 * error(plain, exact)


@UPDATES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fresh_adapter_changes_no_bit(dtype: torch.dtype, update: str) -> None:
    model, ids = table(dtype), torch.arange(41)
    want = model(ids)
    assert torch.equal(lora.inject(model, targets=["0"], update=update)(ids), want)
    assert adapters_of(model[0])["default"].B.any() and not adapters_of(model[0])["default"].A.any()


def test_the_padding_token_keeps_its_row_and_has_no_gradient() -> None:
    model, ids = lora.inject(table(padding_idx=3), targets=["0"], r=4), torch.tensor([[3, 5, 3, 7]])
    part, padding = adapters_of(model[0])["default"], model[0].weight[3].clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids).pow(2).sum().backward()
        assert not part.A.grad[:, 3].any() and part.A.grad[:, 5].any()
        optimizer.step()
    assert torch.equal(model(ids)[0, 0], padding)


def test_gradients_scaled_by_frequency() -> None:
    model, ids = adapted(scale_grad_by_freq=True), torch.tensor([5, 5, 5, 7])
    part = adapters_of(model[0])["default"]
    model(ids).sum().backward()
    scaled = part.A.grad.clone()
    part.A.grad = None
    model[0].scale_grad_by_freq = False
    model(ids).sum().backward()
    torch.testing.assert_close(scaled[:, 5], part.A.grad[:, 5] / 3)
    torch.testing.assert_close(scaled[:, 7], part.A.grad[:, 7])


@UPDATES
def test_dropout_takes_whole_tokens_and_keeps_the_mean(update: str) -> None:
    model, ids = lora.inject(table(), targets=["0"], r=4, dropout=0.25, update=update), torch.full((4000,), 5)
    host = fill(model)[0].train()
    part, W = adapters_of(host)["default"], host.weight.detach().double()
    D = part.scaling * part.B.detach().double() @ part.A.detach().double()
    norm = (W.t() + D).norm(dim=1)
    c = part.magnitude.detach().double() / norm if update == "dora" else torch.ones(24, dtype=torch.float64)
    base, update_row = c * W[5], c * D[:, 5] / 0.75
    torch.manual_seed(0)
    y = model(ids).detach().double()
    dropped = (y - base).norm(dim=1) < 1e-5
    assert 0.22 < dropped.double().mean() < 0.28
    torch.testing.assert_close(y[~dropped], (base + update_row).expand_as(y[~dropped]), rtol=1e-4, atol=1e-5)


def test_a_token_never_seen_keeps_its_row_to_the_bit() -> None:
    model = lora.inject(table(), targets=["0"], r=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model[0].weight.clone()
    for _ in range(5):
        optimizer.zero_grad()
        (model(torch.tensor([1, 2, 3])) - 1).pow(2).sum().backward()
        optimizer.step()
    now = model(torch.arange(41))
    assert torch.equal(now[4:], before[4:]) and torch.equal(now[0], before[0])
    assert all(not torch.equal(now[t], before[t]) for t in (1, 2, 3))


def test_gradients_repeat_bit_for_bit() -> None:
    model, ids = adapted("dora"), ids_of((64, 32))
    found = []
    for _ in range(2):
        model.zero_grad()
        model(ids).pow(3).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_table_with_sparse_gradients_trains_in_dense_ones() -> None:
    model, ids = adapted(sparse=True), ids_of((9,))
    dense = adapted()
    for each in (model, dense):
        each(ids).pow(2).sum().backward()
    for p, q in zip(model.parameters(), dense.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (not p.grad.is_sparse and torch.equal(p.grad, q.grad))


def test_several_adapters_add_their_changes() -> None:
    model, ids = table(), torch.arange(41)
    for i, (name, update) in enumerate({"d": "dora", "p": "lora", "e": "dora"}.items()):
        fill(lora.inject(model, targets=["0"], r=2 + i, name=name, update=update), seed=i)
    lora.activate(model, ["d", "p", "e"])
    assert error(model(ids), together64(model[0]).detach().t()[ids]) < 1e-6


def test_activate_disable_remove_and_copies() -> None:
    model, ids = table(), ids_of((9,))
    base, before = model(ids), snapshot(model)
    want = fill(lora.inject(model, targets=["0"], dora=True))(ids)
    assert torch.equal(copy.deepcopy(model)(ids), want) and not torch.equal(want, base)
    with lora.disabled(model):
        assert torch.equal(model(ids), base)
    lora.remove(model)
    assert torch.equal(model(ids), base) and same_bits(snapshot(model), before) and type(model[0]) is nn.Embedding


def test_compiles_to_one_graph() -> None:
    model, ids = adapted("dora"), ids_of((3, 7))
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), model(ids))


def test_a_norm_limit_is_refused() -> None:
    model = table(max_norm=1.0)
    refused(lambda: lora.inject(model, targets=["0"]), model, "'0' has max_norm=1.0, which rewrites the frozen table")


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 5.0


class Named(nn.Embedding):
    """A subclass that keeps its forward."""


def test_a_class_with_a_forward_of_its_own_is_refused_and_one_without_is_not() -> None:
    model = nn.Sequential(Scaled(5, 4))
    refused(lambda: lora.inject(model, targets=["0"]), model, "'0' is a .*Scaled, which has a forward of its own")
    model = nn.Sequential(Named(5, 4))
    assert [name for name, _, _ in hosts(lora.inject(model, targets=["0"]))] == ["0"]


@UPDATES
@pytest.mark.parametrize("tokens", [50, 30])
def test_a_table_that_was_given_another_size_is_refused(tokens: int, update: str) -> None:
    model = adapted(update)
    model[0].weight.data = torch.randn(tokens, 24)
    model[0].num_embeddings = tokens
    with pytest.raises(lora.LoraError, match=f"the table has {tokens} rows now and the adapter was made for 41"):
        model(torch.tensor([1]))
    with pytest.raises(lora.LoraError, match=f"the table has {tokens} rows now and the adapter was made for 41"):
        lora.merge(model)


@UPDATES
def test_an_adapter_may_come_before_the_values_of_its_table(update: str, tmp_path: Any) -> None:
    model, ids = adapted(update), ids_of((9,))
    want = model(ids)
    lora.save(model, tmp_path)
    with torch.device("meta"):
        later = nn.Sequential(nn.Embedding(41, 24))
    lora.load(later, tmp_path, check=False)
    assert all(not p.is_meta for p in adapters_of(later[0])["default"].parameters())
    later[0].weight = nn.Parameter(model[0].weight.detach().clone(), requires_grad=False)
    assert torch.equal(later(ids), want)
    row = lora.summary(model).rows[0]
    assert (row.shape, row.runs, row.kind.split()[0]) == ((24, 41), "lookup", "Embedding")
