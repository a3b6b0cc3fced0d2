"""Targets that train nothing are named once, after the first backward pass."""

import copy
import gc
import io
import itertools
import pickle
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
from lora import LoraWarning
from lora.layers.unreached import Watch
from said import said

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).tanh()  # k is never called, and nobody reads it


class Layers(nn.Module):
    """Layers of which some run, and checkpointed ones where asked."""

    def __init__(self, count: int = 3, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(count))
        self.head = nn.Linear(4, 2)
        self.runs: list[int] = list(range(count))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for i in self.runs:
            layer = self.layers[i]
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


def step(model: nn.Module, x: Tensor = X) -> None:
    model(x).sum().backward()


def hooks(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def test_dead_target_is_named_once_after_the_first_backward_pass_with_its_count_and_what_to_do() -> None:
    model = lora.inject(Layers(), targets=["q", "k"])
    with said("3 of 6 modules of adapter 'default' had no gradient in the first backward pass: k (3)."):
        step(model)
    assert hooks(model) == 0
    with said():
        step(model)


def test_dead_target_is_named_so_that_exclude_takes_the_words() -> None:
    model = Layers()
    model.layers[1].forward = lambda x: model.layers[1].k(x)
    lora.inject(model, targets=["q", "k", "head"])
    names = ["layers.0.k", "layers.1.q", "layers.2.k"]
    with said(f"exclude={names!r}"):
        step(model)
    lora.remove(model)
    lora.inject(model, targets=["q", "k", "head"], exclude=names)
    with said():
        step(model)


def test_a_model_of_which_all_targets_train_says_nothing() -> None:
    with said():
        step(lora.inject(Layers(), targets=["q", "head"]))


def test_dead_target_under_gradient_accumulation_is_named_after_the_first_of_the_passes() -> None:
    model = lora.inject(Layers(), targets=["q", "k"])
    with said("k (3)"):
        for _ in range(4):
            step(model)
    with said():
        model.zero_grad()
        step(model)


def test_dead_target_of_one_of_two_losses_is_named_with_the_word_that_another_may_reach_it() -> None:
    model = lora.inject(
        nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)}), targets=["first", "second"]
    )
    with said("Unless another loss or batch reaches them, leave them out with exclude=['second']"):
        model["first"](X).sum().backward()
        model["second"](X).sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("adapt", [["q", "k"], ["q", "k", "head"]], ids=str)
def test_dead_target_in_checkpointed_layers_is_named_after_the_whole_pass(reentrant: bool, adapt: list[str]) -> None:
    model = lora.inject(Layers(reentrant=reentrant), targets=adapt)
    with said("k (3)."):
        step(model, X.clone().requires_grad_())
    assert hooks(model) == 0


def test_what_stands_before_checkpointed_layers_has_its_gradient_after_theirs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), Layers(reentrant=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.first(x))

    model = lora.inject(Net(), targets=["first", "q"])
    with said():
        step(model)
    assert hooks(model) == 0


def test_checkpoints_within_checkpoints_are_one_pass() -> None:
    model = lora.inject(Layers(reentrant=True), targets=["q", "k"])
    x = X.clone().requires_grad_()
    with said("k (3)."):
        checkpoint(model, x, use_reentrant=True).sum().backward()


def test_dead_target_is_named_after_a_pass_that_failed_before() -> None:
    model = lora.inject(Layers(), targets=["q", "k"])

    def fails(_: Tensor) -> None:
        raise RuntimeError("out of memory")

    y = model(X)
    handle = model.layers[0].q.lora["default"].A.register_hook(fails)
    with said(), pytest.raises(RuntimeError, match="out of memory"):
        y.sum().backward()
    handle.remove()
    with said("k (3)"):
        step(model)


def test_a_layer_that_is_dropped_at_random_is_waited_for_and_then_named() -> None:
    model = lora.inject(Layers(), targets=["q", "head"])
    model.runs = [0, 2]
    with said():
        step(model)
        model.runs = [0, 1]
        step(model)
    assert hooks(model) == 0  # all have had one
    model = lora.inject(Layers(), targets=["q", "head"])
    model.runs = [0, 2]
    with said():
        for _ in range(7):
            step(model)
    with said("1 of 4 modules of adapter 'default' had no gradient in 8 backward passes: layers.1.q (1)"):
        step(model)
    assert hooks(model) == 0


def test_an_adapter_that_does_not_act_in_the_first_pass_is_not_named() -> None:
    model = lora.inject(Layers(), targets=["q", "k"], name="one")
    lora.inject(model, targets=["head"], name="two")
    with said():
        step(model)
    lora.activate(model, "one")
    with said("of adapter 'one' had no gradient"):
        step(model)


def test_adapters_that_act_together_are_named_each() -> None:
    model = lora.inject(Layers(), targets=["q", "k"], name="one")
    lora.inject(model, targets=["k", "head"], name="two")
    lora.activate(model, ["one", "two"])
    with said("' had no gradient", "' had no gradient") as texts:
        step(model)
    assert sorted(text.partition("' had")[0][-3:] for text in texts) == ["one", "two"]


def test_an_adapter_that_is_removed_before_the_first_pass_is_not_named() -> None:
    model = lora.inject(Layers(), targets=["q", "k"], name="one")
    lora.remove(model)
    lora.inject(model, targets=["q"], name="one")
    with said():
        step(model)


def test_gradients_that_an_optimizer_takes_within_the_pass_say_nothing() -> None:
    model = lora.inject(Layers(), targets=["q", "head"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    before = hooks(model)
    with said():
        for _ in range(8):
            step(model)
    assert hooks(model) < before == sum(p.requires_grad for p in model.parameters()) + 4


def test_what_the_user_has_frozen_meanwhile_is_not_named() -> None:
    model = lora.inject(Layers(), targets=["q", "k"])
    for layer in model.layers:
        layer.k.lora.requires_grad_(False)
    with said():
        step(model)


@pytest.mark.parametrize("trainable", [True, False])
def test_dead_target_of_a_loaded_adapter_is_named_where_it_trains(trainable: bool, tmp_path: Path) -> None:
    lora.save(lora.inject(Layers(), targets=["q", "k"]), tmp_path)
    model = lora.load(Layers(), tmp_path, trainable=trainable)
    x = X.clone().requires_grad_()
    with said(*["k (3)"] * trainable):
        step(model, x)


def test_dead_target_beside_a_module_trained_whole_that_nobody_calls() -> None:
    model = Layers()
    model.spare = nn.Linear(4, 4)
    lora.inject(model, targets=["q"], train=["spare"], bias="all")
    with said("spare. The loss does not depend on what the adapter adds there"):
        step(model)


def test_watched_models_are_copied_and_pickled_and_a_copy_is_not_watched() -> None:
    model = lora.inject(Layers(), targets=["q", "k"])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        with said():
            step(twin)
    with said("k (3)"):
        step(model)


def test_a_model_that_never_trains_is_freed() -> None:
    model = lora.inject(Layers(), targets=["q", "k"])
    gone = [weakref.ref(model), weakref.ref(model.layers[0].q.lora["default"].A)]
    del model
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_gradients_that_are_taken_without_being_kept_say_nothing() -> None:
    model = lora.inject(Layers(), targets=["q", "k"])
    with said():
        torch.autograd.grad(model(X).sum(), [model.layers[0].q.lora["default"].B])
    with said("k (3)"):
        step(model)


def test_dead_target_of_a_compiled_model_is_named_and_nothing_is_compiled_again() -> None:
    model = lora.inject(Layers(), targets=["q", "k"])
    compiled = torch.compile(model, backend="aot_eager")
    with said("k (3)"):
        step(compiled)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        with said():
            step(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


def test_a_later_step_calls_nothing_of_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    ask = Watch.ask
    monkeypatch.setattr(Watch, "ask", lambda self, *a: (next(calls), ask(self, *a))[1])
    model = lora.inject(Layers(), targets=["q"])
    step(model)
    first = next(calls)
    assert first
    step(model)
    assert next(calls) == first + 1


def _distributed(rank: int, folder: str, kind: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = lora.inject(Layers(), targets=["q", "k", "head"])
        if kind == "ddp":
            wrapped: nn.Module = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        else:
            from torch.distributed.fsdp import fully_shard

            wrapped = fully_shard(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                step(wrapped)
        texts = [str(w.message) for w in caught if issubclass(w.category, LoraWarning)]
        expected = ["k (3)"] if kind == "ddp" else []
        assert len(texts) == len(expected) and all(e in t for e, t in zip(expected, texts, strict=True)), texts
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_dead_target_over_two_processes(kind: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_distributed, args=(str(tmp_path), kind), nprocs=2)
