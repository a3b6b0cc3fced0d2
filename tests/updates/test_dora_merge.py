"""DoRA folded into a weight and taken out again, to the bit."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora
from conftest import refused, same_bits, snapshot, tiny_llama
from dora_oracle import error, fill, together64
from lora.layers import adapters_of, hosts
from two_kinds import TwoKinds, merge

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Three(nn.Module):
    """A linear, a Conv1D and a table."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(rows * 1000 + columns)
        self.linear, self.conv = nn.Linear(columns, rows), Conv1D(rows, columns)
        self.table = nn.Embedding(columns, rows, padding_idx=0)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.conv(x) + self.table(torch.arange(len(x)) % self.table.num_embeddings)


NAMES = ["linear", "conv", "table"]


def weights64(model: nn.Module) -> dict[str, Tensor]:
    return {name: together64(host).detach() for name, host, _ in hosts(model)}


def base_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in snapshot(model).items() if "lora." not in key}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    r=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    std=st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0, 30.0]),
    stretch=st.sampled_from([0.0, 1e-4, 0.3, 5.0]),
    others=st.sampled_from([(), ("dora",), ("lora",), ("dora", "lora")]),
)
def test_unmerge_gives_back_every_bit(
    rows: int, columns: int, r: int, dtype: torch.dtype, std: float, stretch: float, others: tuple[str, ...]
) -> None:
    model = Three(rows, columns, dtype)
    model.linear.weight.data.view(-1)[0] = -0.0
    model.table.weight.data.view(-1)[-1] = -0.0
    for update in ("dora", *others):
        lora.inject(model, targets=NAMES, r=r, update=update, name=f"a{len(list(model.linear._modules))}{update}")
        fill(model, std, stretch)
    lora.activate(model, list(adapters_of(model.linear).records))
    before = snapshot(model)
    try:
        merge(model)
    except lora.LoraError as error:
        if dtype != torch.float16 or "infinity" not in str(error):
            raise
    else:
        lora.unmerge(model)
    assert same_bits(snapshot(model), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("others", [(), ("dora",), ("dora", "lora")], ids=str)
def test_the_merged_weight_is_the_definitions_rounded_once(dtype: torch.dtype, others: tuple[str, ...]) -> None:
    model = Three(33, 45, dtype)
    for i, update in enumerate(("dora", *others)):
        lora.inject(model, targets=NAMES, r=4, update=update, name=f"a{i}")
        fill(model, seed=i)
    lora.activate(model, list(adapters_of(model.linear).records))
    exact, x = weights64(model), torch.randn(6, 45).to(dtype)
    acting = model(x)
    report = merge(model)
    for name, wanted in exact.items():
        got = adapters_of(model.get_submodule(name)).frozen.dense()
        if dtype.itemsize == 2:  # D and the sum are in fp32 before: next to a tie that is not one rounding
            assert (got != wanted.to(dtype)).float().mean() < 2e-3, name
        slack = 1e-7 if dtype == torch.float32 else 1e-15
        assert error(got, wanted) <= 1.01 * error(wanted.to(dtype), wanted) + slack
    assert all(0.99 < m.kept < 1.01 and m.noise < 0.05 for m in report.modules)
    assert error(model(x), acting.double()) < {torch.float32: 1e-6, torch.float64: 1e-6}.get(dtype, 1e-2)


def test_the_report_has_what_was_kept_and_lost() -> None:
    model = Three(64, 48, torch.bfloat16)
    fill(lora.inject(model, targets=NAMES, dora=True), std=3e-3, stretch=3e-3)
    old = {name: adapters.frozen.dense().double().clone() for name, _, adapters in hosts(model)}
    exact = weights64(model)
    for entry in merge(model).modules:
        D = exact[entry.name] - old[entry.name]
        C = adapters_of(model.get_submodule(entry.name)).frozen.dense().double() - old[entry.name]
        assert entry.kept == pytest.approx(((C * D).sum() / (D * D).sum()).item(), rel=1e-4)
        assert entry.noise == pytest.approx(((C - D).norm() / D.norm()).item(), rel=1e-4)
        assert entry.noise > 0.005


def test_a_fresh_adapters_merge_keeps_all_of_nothing() -> None:
    for dtype in DTYPES:
        model = Three(64, 48, dtype)
        before = base_of(model)
        report = lora.merge(lora.inject(model, targets=NAMES, dora=True))  # a LoraWarning is an error here
        assert report.kept == 1.0 and same_bits(base_of(model), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [[-1.0, 0.0, -0.0], [1e-30, 1e4, -1e4], [1e-45, 1.0, -3.0]], ids=str)
def test_odd_magnitudes_find_the_way_back(values: list[float], dtype: torch.dtype) -> None:
    model = Three(63, 40, dtype)
    fill(lora.inject(model, targets=NAMES, dora=True))
    model.linear.weight.data[0] = 0
    model.linear.weight.data[1, ::2] = -0.0
    for _, _, adapters in hosts(model):
        adapters["default"].magnitude.data[:3] = torch.tensor(values)
    before, x = snapshot(model), torch.randn(6, 40).to(dtype)
    acting = model(x)
    merge(model)
    assert error(model(x), acting.double()) < (1e-5 if dtype in DTYPES[::3] else 2e-2)
    lora.unmerge(model)
    assert same_bits(snapshot(model), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerge_on_another_number_of_threads_and_in_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.exact.patch._BLOCK", 1000)
    model = TwoKinds(193, 160, dtype)
    fill(lora.inject(model, targets=["linear", "conv"], dora=True))
    before = snapshot(model)
    merge(model)
    assert len(adapters_of(model.linear).undo.patches) == 33
    try:
        torch.set_num_threads(2)
        lora.unmerge(model)
    finally:
        torch.set_num_threads(1)
    assert same_bits(snapshot(model), before)


@pytest.mark.parametrize("key", ["A", "B", "weight", "magnitude"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_changed_after_the_merge_never_gives_another_weight(name: str, dtype: torch.dtype, key: str) -> None:
    model = Three(33, 45, dtype)
    fill(lora.inject(model, targets=NAMES, dora=True))
    before = base_of(model)
    merge(model)
    host = model.get_submodule(name)
    tensor = host.weight if key == "weight" else getattr(adapters_of(host)["default"], key)
    tensor.data[1] *= 1.5
    if key == "magnitude" or (key != "weight" and dtype == torch.float64):  # the way back does not read it
        lora.unmerge(model)
        assert same_bits(base_of(model), before)
    else:
        refused(lambda: lora.unmerge(model), model, f"'{name}' cannot be unmerged: its weight, bias or adapter")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_magnitude_that_is_no_number_is_refused(name: str, value: float) -> None:
    model = fill(lora.inject(Three(33, 45, torch.float32), targets=NAMES, dora=True))
    adapters_of(model.get_submodule(name))["default"].magnitude.data[3] = value
    refused(lambda: lora.merge(model), model, f"magnitude of adapter 'default' on '{name}' has NaN or infinity")


def test_an_overflow_is_refused_and_changes_nothing() -> None:
    model = fill(lora.inject(Three(33, 45, torch.float16), targets=NAMES, dora=True))
    adapters_of(model.table)["default"].magnitude.data[3] = 1e7
    refused(lambda: lora.merge(model), model, "merging 'table' gives NaN or infinity in float16")


def test_tied_weights_are_refused_by_both_names() -> None:
    model = lora.inject(tiny_llama(tie_word_embeddings=True), targets=["lm_head"], dora=True)
    refused(lambda: lora.merge(model), model, "model.embed_tokens.weight and lm_head.weight are tied")


def test_a_model_unloaded_is_plain_and_computes_what_acted(ids: Tensor) -> None:
    model: Any = fill(lora.inject(tiny_llama(), targets="all-linear", dora=True), std=0.05)
    bare, want = tiny_llama(), model(ids).logits
    lora.merge(model, unload=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()]
    assert error(model(ids).logits, want.double()) < 1e-5


def test_a_merge_of_a_copy_leaves_the_model() -> None:
    model = fill(lora.inject(Three(33, 45, torch.bfloat16), targets=NAMES, dora=True))
    before = snapshot(model)
    twin = copy.deepcopy(model)
    merge(twin)
    assert same_bits(snapshot(model), before)
    lora.unmerge(twin)
    assert same_bits(snapshot(twin), before)
