"""Linears that share an input run as one operator: on the CPU here, through the operator's plain-torch form."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize, tiny_bert, tiny_llama
from lora.kernels.tuning import Card
from lora.layers import groups, hosts, plan

CALLS: list[int] = []


@pytest.fixture(autouse=True)
def fused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = groups.fused_linear

    def counted(x, weights, *rest, **keywords):  # type: ignore[no-untyped-def]
        CALLS.append(len(weights))
        return real(x, weights, *rest, **keywords)

    monkeypatch.setattr(plan, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(plan, "DTYPES", (torch.float32,))
    monkeypatch.setattr(plan, "HAS_TRITON", True)
    monkeypatch.setattr(groups, "fused_linear", counted)
    CALLS.clear()


@pytest.fixture
def model() -> nn.Module:
    return randomize(lora.inject(tiny_llama(), r=4, targets="all-linear"))


def plain(model: nn.Module, run) -> object:  # type: ignore[no-untyped-def]
    """The same without the fused path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "DEVICES", ())
        return run(model)


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)


def idle(model: nn.Module) -> bool:
    found = [a.group for _, _, a in hosts(model) if a.group is not None]
    return bool(found) and not any(g.ready for g in found)


def test_q_k_v_and_gate_up_run_together(model: nn.Module, ids: Tensor) -> None:
    got = model(ids).logits
    assert CALLS == [3, 1, 2, 1] * 3
    assert idle(model)
    torch.testing.assert_close(got, plain(model, lambda m: m(ids).logits), rtol=1e-4, atol=1e-5)
    same(gradients(model, ids), plain(model, lambda m: gradients(m, ids)))


def test_bert_with_biases(ids: Tensor) -> None:
    model = randomize(lora.inject(tiny_bert(), targets="all-linear", bias="lora_only"))
    got = model(ids).logits
    assert 3 in CALLS
    torch.testing.assert_close(got, plain(model, lambda m: m(ids).logits), rtol=1e-4, atol=1e-5)


def test_two_active_adapters_of_other_targets_and_ranks(ids: Tensor) -> None:
    model = randomize(lora.inject(tiny_llama(), r=4, targets=["q_proj", "k_proj", "v_proj"], name="one"))
    randomize(lora.inject(model, r=3, alpha=1, targets=["k_proj", "gate_proj", "up_proj"], name="two"), seed=2)
    lora.activate(model, ["one", "two"])
    got = model(ids).logits
    assert CALLS == [3, 2] * 3
    torch.testing.assert_close(got, plain(model, lambda m: m(ids).logits), rtol=1e-4, atol=1e-5)
    same(gradients(model, ids), plain(model, lambda m: gradients(m, ids)))
    lora.activate(model, "two")
    CALLS.clear()
    torch.testing.assert_close(model(ids).logits, plain(model, lambda m: m(ids).logits), rtol=1e-4, atol=1e-5)
    assert CALLS == [1, 2] * 3


class Cross(nn.Module):
    """k and v see another tensor than q."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(memory) * self.v_proj(memory)


def test_members_that_are_fed_other_tensors_are_right_and_part() -> None:
    model = randomize(lora.inject(nn.Sequential(Cross()), targets=["q_proj", "k_proj", "v_proj"]))[0]
    for _ in range(2):
        x, memory = torch.randn(3, 8), torch.randn(3, 8)
        torch.testing.assert_close(model(x, memory), plain(model, lambda m: m(x, memory)))  # noqa: B023
    assert model.q_proj.lora.group is None
    assert CALLS[-3:] == [1, 1, 1]


def test_an_input_changed_in_place_between_members_is_seen() -> None:
    model = randomize(lora.inject(nn.Sequential(Cross()), targets=["q_proj", "k_proj", "v_proj"]))[0]
    x = torch.randn(3, 8)
    model.q_proj(x)
    x += 1
    torch.testing.assert_close(model.k_proj(x), plain(model, lambda m: m.k_proj(x)))


@pytest.mark.parametrize("change", ["bias", "activate", "train", "write", "merge"])
def test_what_changes_between_two_members_is_seen(change: str) -> None:
    model = randomize(
        lora.inject(nn.Sequential(Cross()), targets=["q_proj", "k_proj", "v_proj"], dropout=0.5, name="a")
    )
    randomize(lora.inject(model, targets=["q_proj", "k_proj", "v_proj"], name="b"), seed=5)
    net, x = model[0], torch.randn(3, 8)
    model.train(change == "train")
    net.q_proj(x)
    if change == "activate":
        lora.activate(model, "a")
    elif change == "train":
        lora.activate(model, "a")
        net.q_proj(x)
        model.eval()
    elif change == "bias":
        with torch.no_grad():
            net.k_proj.bias.add_(1)
    elif change == "write":
        with torch.no_grad():
            net.k_proj.lora["b"].B += 1
    else:
        lora.merge(model)
        lora.unmerge(model)
    # Close, not equal: on some CPUs a product of several targets sums in another order than one alone.
    torch.testing.assert_close(copy.deepcopy(model)[0].k_proj(x), net.k_proj(x))
    torch.testing.assert_close(net.k_proj(x), plain(net, lambda m: m.k_proj(x)))


def test_a_member_that_is_never_called_leaves_nothing_wrong() -> None:
    model = randomize(lora.inject(nn.Sequential(Cross()), targets=["q_proj", "k_proj", "v_proj"]))[0]
    for _ in range(3):
        x = torch.randn(3, 8)
        torch.testing.assert_close(model.q_proj(x), plain(model, lambda m: m.q_proj(x)))  # noqa: B023


def test_nothing_is_kept_alive_after_the_last_one_collected(model: nn.Module, ids: Tensor) -> None:
    alive: list[weakref.ref[Tensor]] = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda m, a: alive.append(weakref.ref(a[0]))
    )
    with torch.no_grad():
        model(ids)
    handle.remove()
    gc.collect()
    assert len(alive) == 1
    assert alive[0]() is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model: nn.Module, ids: Tensor, reentrant: bool) -> None:
    model.train()
    want = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    same(gradients(model, ids), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_is_the_same_when_recomputed(ids: Tensor, reentrant: bool) -> None:
    model = randomize(lora.inject(tiny_llama(), r=4, targets="all-linear", dropout=0.3)).train()
    want = gradients(model, ids)
    again = gradients(model, ids)
    assert all(torch.equal(want[n], again[n]) for n in want)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    same(gradients(model, ids), want)


def same_compiled(model: nn.Module, want: dict[str, Tensor], ids: Tensor, fullgraph: bool) -> None:
    torch._dynamo.reset()
    got = gradients(torch.compile(model, fullgraph=fullgraph, backend="aot_eager"), ids)
    assert idle(model)
    assert got.keys() == {f"_orig_mod.{name}" for name in want}
    for name, value in want.items():
        assert (got[f"_orig_mod.{name}"] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compile_fullgraph(dropout: float, ids: Tensor) -> None:
    model = randomize(lora.inject(tiny_llama(), r=4, targets="all-linear", dropout=dropout)).train()
    same_compiled(model, gradients(model, ids), ids, fullgraph=True)


def test_checkpointing_within_a_compiled_model(model: nn.Module, ids: Tensor) -> None:
    """A group changes its own state, which torch does not trace within a checkpoint: the graph breaks there."""
    want = gradients(model.train(), ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same_compiled(model, want, ids, fullgraph=False)


def test_hooks_of_every_member_run(model: nn.Module, ids: Tensor) -> None:
    seen = []
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(model.model.layers[0].self_attn, name).register_forward_hook(lambda m, a, y: seen.append(y.shape[-1]))
    model(ids)
    assert seen == [48, 24, 24]


def test_copies_have_groups_of_their_own(model: nn.Module, ids: Tensor) -> None:
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, model(ids).logits)
        for _, host, adapters in hosts(twin):
            assert adapters.group is None or host in adapters.group.members


def test_disabled_merged_and_removed_members(model: nn.Module, ids: Tensor) -> None:
    base = tiny_llama()(ids).logits
    with lora.disabled(model):
        assert torch.equal(model(ids).logits, base)
    want = model(ids).logits
    lora.merge(model)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    lora.unmerge(model)
    assert torch.equal(model(ids).logits, want)
    lora.inject(model, targets=["q_proj"], name="other")
    lora.activate(model, "default")
    assert torch.equal(model(ids).logits, want)
    lora.remove(model, "default")
    assert torch.equal(model(ids).logits, base)


def runs(model: nn.Module) -> set[str]:
    return {row.runs for row in lora.summary(model).rows}


@pytest.mark.parametrize(
    ("major", "words"),
    [
        (9, "fused, dX by cuBLAS (too narrow)"),
        (8, "fused, dX and dB by cuBLAS (no Hopper GPU)"),
        (10, "fused, dX and dB by cuBLAS (no Hopper GPU)"),
        (7, "fused, all by cuBLAS (GPU older than Ampere)"),
    ],
)
def test_summary_says_what_a_step_runs_on(
    major: int, words: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "card", lambda device: Card(major, 132, 227 << 10))
    monkeypatch.setattr(plan, "DTYPES", (torch.bfloat16,))
    assert runs(model.to(torch.bfloat16)) == {words}
    assert lora.summary(model).groups == 6
    assert "6 groups of linears share an input" in str(lora.summary(model))


def test_summary_counts_the_ranks_of_all_that_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "card", lambda device: Card(9, 132, 227 << 10))
    monkeypatch.setattr(plan, "DTYPES", (torch.bfloat16,))
    model = lora.inject(tiny_llama(), r=16, targets=["q_proj", "k_proj", "v_proj", "o_proj"]).to(torch.bfloat16)
    words = {row.target.rpartition(".")[2]: row.runs for row in lora.summary(model).rows}
    together = "fused, dX by cuBLAS (too narrow), dA by cuBLAS (over 32 ranks)"
    assert words == dict.fromkeys(["q_proj", "k_proj", "v_proj"], together) | {
        "o_proj": "fused, dX by cuBLAS (too narrow)"
    }


def test_summary_says_why_not(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "card", lambda device: Card(9, 132, 227 << 10))
    fused = "fused, all by cuBLAS (no 16-bit compute)"  # float32 is only pretended to be fused here
    assert runs(model) == {fused}
    with torch.autocast("cpu", torch.bfloat16):
        monkeypatch.setattr(plan, "DTYPES", (torch.float32, torch.bfloat16))
        assert runs(model) == {"plain torch (autocast over weights of another dtype)"}
    lora.inject(model, r=2, targets=["q_proj"], name="two", dropout=0.1)
    lora.activate(model, ["default", "two"])
    model.train()
    assert runs(model) == {fused, "plain torch (active adapters with different dropout)"}
    lora.activate(model, "default")
    monkeypatch.setattr(plan, "HAS_TRITON", False)
    assert runs(model) == {"plain torch (triton is not installed)", "idle"}
    monkeypatch.setattr(plan, "DTYPES", (torch.bfloat16,))
    assert runs(model) == {"plain torch (float32 compute)", "idle"}
    monkeypatch.setattr(plan, "DEVICES", ("cuda",))
    assert runs(model) == {"plain torch (on cpu)", "idle"}
