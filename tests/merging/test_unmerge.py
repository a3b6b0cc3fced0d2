"""unmerge: the way back to the bit, what it costs in memory, and changes that are noticed."""

import math

import pytest
import torch
from torch import Tensor

import lora
from conftest import randomize, same_bits, snapshot, unchanged
from lora.layers import adapters_of, hosts
from tiny_base import EXAMPLE
from two_kinds import DTYPES, TwoKinds, merge, scale_updates


@pytest.mark.parametrize("ratio", [0.001, 0.03, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerge_is_bit_exact_after_100_cycles(dtype: torch.dtype, ratio: float) -> None:
    model = TwoKinds(96, 80, dtype)
    lora.inject(model, r=4, targets=["linear", "conv"])
    scale_updates(model, ratio)
    before = snapshot(model)
    merge(model)
    merged = snapshot(model)
    assert not torch.equal(merged["linear.weight"], before["linear.weight"])
    for _ in range(99):
        lora.unmerge(model)
        assert same_bits(snapshot(model), before)
        merge(model)
        assert same_bits(snapshot(model), merged)
    lora.unmerge(model)
    assert same_bits(snapshot(model), before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_unmerge_is_bit_exact_in_several_blocks_and_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.exact.patch._BLOCK", 1000)  # 160 columns: 6 rows a block, and a shorter last one
    model = TwoKinds(193, 160, dtype)
    lora.inject(model, r=5, targets=["linear", "conv"])
    scale_updates(model, 0.3)
    before = snapshot(model)
    merge(model)
    assert len(adapters_of(model.linear).undo.patches) == math.ceil(193 / 6)
    try:
        torch.set_num_threads(2)
        lora.unmerge(model)
    finally:
        torch.set_num_threads(1)
    assert same_bits(snapshot(model), before)


def reachable_bytes(thing: object, seen: set[int] | None = None) -> int:
    """Bytes of every tensor storage that an object holds, each storage once and whole (a view holds all of it)."""
    seen = set() if seen is None else seen
    if isinstance(thing, Tensor):
        storage = thing.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(thing, dict):
        return sum(reachable_bytes(v, seen) for v in thing.values())
    if isinstance(thing, (list, tuple, set)):
        return sum(reachable_bytes(v, seen) for v in thing)
    return reachable_bytes(vars(thing), seen) if hasattr(thing, "__dict__") else 0


@pytest.mark.parametrize("ratio", [0.001, 0.03, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["heavy tails", "gaussian"])
def test_undo_memory(dtype: torch.dtype, ratio: float, kind: str) -> None:
    """At most 15 % in the ordinary case; a fifth where eight-fold columns and heavy tails carry W0's norm."""
    model = TwoKinds(768, 512, dtype)
    if kind == "gaussian":
        for weight in (model.linear.weight, model.conv.weight):
            weight.data.normal_(std=0.02)
    lora.inject(model, r=8, targets=["linear", "conv"])
    scale_updates(model, ratio)
    merge(model)
    for host in (model.linear, model.conv):
        undo = adapters_of(host).undo
        held = reachable_bytes(undo)
        assert undo.nbytes <= held <= 0.15 * host.weight.nbytes, held / host.weight.nbytes
        assert held == pytest.approx(undo.nbytes, rel=0.01, abs=16)  # what it says is what it holds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_undo_memory_on_a_trained_model(dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=dtype)
    lora.inject(model, r=8, targets="all-linear")
    scale_updates(model, 0.1)
    merge(model)
    weights = sum(host.weight.nbytes for _, host, _ in hosts(model))
    assert sum(reachable_bytes(adapters.undo) for _, _, adapters in hosts(model)) <= 0.15 * weights


def test_unmerge_that_fails_in_the_last_module_stays_merged() -> None:
    model = TwoKinds(dtype=torch.bfloat16)
    lora.inject(model, targets=["linear", "conv"])
    scale_updates(model, 0.5)
    merge(model)
    A = adapters_of(model.conv)["default"].A
    kept = A.detach().clone()
    A.data[0] += 1
    with unchanged(model), pytest.raises(lora.LoraError, match="conv"):
        lora.unmerge(model)
    A.data.copy_(kept)
    lora.unmerge(model)
    assert type(model.conv).__name__ != "Conv1D"  # acts again


@pytest.mark.parametrize("what", ["A", "B", "weight", "scaling", "bias"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_change_while_merged_is_refused_and_the_weight_stays(kind: str, what: str) -> None:
    model = TwoKinds()
    lora.inject(model, targets=["linear", "conv"], bias="lora_only")
    scale_updates(model, 0.1)
    randomize(model, std=1e-3)
    merge(model)
    host = getattr(model, kind)
    part = adapters_of(host)["default"]
    if what == "scaling":
        part.scaling *= 2
    else:
        tensor = {"A": part.A, "B": part.B, "weight": host.weight, "bias": host.bias}[what]
        tensor.data.view(-1)[5] += 0.5
    for verb in (lora.unmerge, lora.remove):
        with unchanged(model), pytest.raises(lora.LoraError, match=kind):
            verb(model)


def test_a_flipped_sign_in_float64_is_noticed() -> None:
    model = TwoKinds(dtype=torch.float64)
    lora.inject(model, targets=["linear"])
    scale_updates(model, 0.1)
    adapters_of(model.linear)["default"].B.data[:2] = 0
    merge(model)
    for place in range(4):
        model.linear.weight.data[0, place] *= -1
        if model.linear.weight[0, place] != 0:
            with pytest.raises(lora.LoraError, match="linear"):
                lora.unmerge(model)
        model.linear.weight.data[0, place] *= -1
    lora.unmerge(model)
