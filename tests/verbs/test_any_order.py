"""disabled, activate, remove and their kin in any order: the outputs are the formula's, and the base comes back."""

import contextlib
import copy
import pickle
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora
from conftest import randomize, same_bits, snapshot
from lora import LoraError
from lora.layers.host import hosts

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A linear used under two names, a Conv1D, a linear without bias, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6, bias=False), Conv1D(6, 6)])
        self.layers.append(self.layers[0])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)
        nn.init.normal_(self.layers[2].bias)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def original(model: nn.Module) -> tuple:
    return (
        [(n, type(m), m.training) for n, m in model.named_modules(remove_duplicate=False)],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
        list(model.state_dict()),
        [sorted(m.__dict__) for m in model.modules()],
    )


class Verbs(RuleBasedStateMachine):
    """The model beside a book of what should be: which adapters are there, which act, and whether they are merged."""

    dtype = torch.float32

    @initialize()
    def start(self) -> None:
        self.model = Net().to(self.dtype)
        self.base = copy.deepcopy(self.model).double()
        self.values, self.shape = snapshot(self.model), original(self.model)
        self.there: dict[str, dict] = {}
        self.active: list[str] = []
        self.merged = False
        self.folders: dict[str, tuple[Path, dict, dict[str, Tensor]]] = {}
        self.blocks: list[tuple] = []
        self.home = tempfile.TemporaryDirectory()
        self.seed = 0

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        while self.blocks:
            self.leave(False)
        if self.there:
            lora.remove(self.model)
        assert original(self.model) == self.shape
        assert same_bits(snapshot(self.model), self.values)
        self.home.cleanup()

    def values_of(self, name: str) -> dict[str, Tensor]:
        named = {f"{h}.{n}": p for h, part in self.parts(name).items() for n, p in part.named_parameters()}
        return {key: p.detach().clone() for key, p in named.items()}

    # The oracle

    def parts(self, name: str) -> dict[str, nn.Module]:
        return {n: a[name] for n, _, a in hosts(self.model) if name in a}

    def expected(self) -> Tensor:
        """The output in float64 from A, B, scaling and the trained copies of what should act."""
        plain = copy.deepcopy(self.base)
        with torch.no_grad():
            for name in self.active:
                for host_name, part in self.parts(name).items():
                    mine, source = plain.get_submodule(host_name), self.base.get_submodule(host_name)
                    if hasattr(part, "A"):
                        book = self.there[name]
                        rank = book["rank_pattern"].get("head", book["r"]) if host_name == "head" else book["r"]
                        scaling = book["alpha"] / (rank**0.5 if book["rslora"] else rank)
                        assert part.A.shape == (rank, 6)
                        update = scaling * part.B.double() @ part.A.double()
                        mine.weight.add_(update.t() if isinstance(mine, Conv1D) else update)
                        if part.bias is not None:
                            mine.bias.add_(part.bias.double() - source.bias)
                    else:
                        # A merge exchanges the values of the copy with the base's.
                        holder = self.model.get_submodule(host_name) if self.merged else part.module
                        for n, p in part.module.named_parameters():
                            mine.get_parameter(n).copy_(holder.get_parameter(n) if p.requires_grad else p)
        return plain(X.double())

    @invariant()
    def outputs_are_the_formulas(self) -> None:
        if not hasattr(self, "model"):
            return
        exact = self.expected()
        error = (self.model(X.to(self.dtype)).double() - exact).norm() / exact.norm()
        # 6 layers of ~8 roundings each, and merged weights rounded to the dtype.
        assert error <= 16 * torch.finfo(self.dtype).eps, error
        if not self.active:
            base = {k.replace(".lora.", ""): v for k, v in snapshot(self.model).items() if ".lora." not in k}
            assert same_bits(base, self.values)

    @invariant()
    def the_book_agrees(self) -> None:
        if not self.__dict__.get("there"):
            return
        found = lora.summary(self.model)
        assert {r.adapter for r in found.rows} == set(self.there)
        assert found.acting == self.active
        assert found.merged == self.merged
        for name, host, adapters in hosts(self.model):
            acts = any(n in adapters for n in self.active)
            assert (type(host) is adapters.original) == (self.merged or not acts), name
        grads = {n.split(".lora.")[1].split(".")[0] for n, p in self.model.named_parameters() if p.requires_grad}
        assert grads == {n for n, s in self.there.items() if s["trainable"]}

    # The verbs

    @contextlib.contextmanager
    def refused_when(self, condition: bool) -> Iterator[None]:
        """The verb fails when it should, and then changes nothing (the invariants check the rest)."""
        if not condition:
            yield
            return
        before, state = snapshot(self.model), original(self.model)
        with pytest.raises(LoraError):
            yield
        assert original(self.model) == state
        assert same_bits(snapshot(self.model), before)

    @rule(
        name=st.sampled_from("abc"),
        r=st.integers(1, 4),
        alpha=st.sampled_from([1, 3.5, 8]),
        rslora=st.booleans(),
        bias=st.sampled_from(["none", "lora_only"]),
        where=st.sampled_from([["0"], ["1", "2"], "all-linear", ["head"], r"layers\.[02]"]),
        whole=st.sampled_from([[], ["norm"]]),
    )
    def inject(self, name: str, where: list[str] | str, whole: list[str], **keywords: object) -> None:
        head = where == ["head"]
        pattern = {"head": 3} if head else {}
        with self.refused_when(name in self.there or self.merged):
            lora.inject(self.model, name=name, targets=where, train=whole, rank_pattern=pattern, **keywords)
            self.there[name] = {**keywords, "rank_pattern": pattern, "trainable": True, "whole": bool(whole)}
            self.active = [name]
            self.train(name)

    def train(self, name: str) -> None:
        """Give an adapter values, as training would."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for part in self.parts(name).values():
                for p in part.parameters():
                    p.add_(0.2 * torch.randn(p.shape, generator=generator))

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.there)), unique=True))
        clash = sum(self.there[n]["whole"] for n in names) > 1
        with self.refused_when(self.merged or clash):
            lora.activate(self.model, names or None)
            self.active = list(names)
        self.sort_active()

    def sort_active(self) -> None:
        """`acting` lists by host, so with adapters on different hosts its order is that of the model."""
        found = lora.summary(self.model).acting if self.there else []
        assert sorted(found) == sorted(self.active)
        self.active = found

    @rule()
    def merge(self) -> None:
        with self.refused_when(self.merged or not self.active), warnings.catch_warnings():
            warnings.simplefilter("ignore", lora.LoraWarning)
            lora.merge(self.model)
            self.merged = True

    @rule()
    def unmerge(self) -> None:
        with self.refused_when(not self.merged):
            lora.unmerge(self.model)
            self.merged = False

    @rule(name=st.sampled_from(["a", "b", "c", None]))
    def remove(self, name: str | None) -> None:
        with self.refused_when(not self.there if name is None else name not in self.there):
            lora.remove(self.model, name)
            self.merged = False
            for gone in list(self.there) if name is None else [name]:
                del self.there[gone]
            self.active = [n for n in self.active if n in self.there]
            if not self.there:
                assert original(self.model) == self.shape
                assert same_bits(snapshot(self.model), self.values)
            else:
                self.sort_active()

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.there)))
        folder = Path(self.home.name) / name
        before = snapshot(self.model)
        lora.save(self.model, folder, name)
        assert same_bits(snapshot(self.model), before)
        with lora.disabled(self.model):  # while merged, the copies of whole modules hold the base's values
            values = self.values_of(name)
        self.folders[name] = (folder, dict(self.there[name]), values)

    @precondition(lambda self: self.folders)
    @rule(data=st.data(), name=st.sampled_from("abc"), trainable=st.booleans())
    def load(self, data: st.DataObject, name: str, trainable: bool) -> None:
        folder, keywords, values = self.folders[data.draw(st.sampled_from(sorted(self.folders)))]
        with self.refused_when(name in self.there or self.merged):
            lora.load(self.model, folder, name, trainable=trainable)
            self.there[name] = {**keywords, "trainable": trainable}
            self.active = [name]
            assert same_bits(self.values_of(name), values)

    @precondition(lambda self: len(self.blocks) < 3)
    @rule()
    def enter_disabled(self) -> None:
        block = lora.disabled(self.model)
        before = (list(self.active), self.merged, list(self.there))
        assert block.__enter__() is self.model
        self.blocks.append((block, before))
        self.active, self.merged = [], False

    @precondition(lambda self: self.blocks)
    @rule(error=st.booleans())
    def leave(self, error: bool) -> None:
        block, (active, merged, there) = self.blocks.pop()
        if error:
            with pytest.raises(KeyError):
                block.__exit__(KeyError, KeyError("x"), None)
                raise KeyError("x")  # what a with statement does when __exit__ does not swallow it
        else:
            block.__exit__(None, None, None)
        # An adapter that was taken out within the block does not come back, and one that came does not act.
        self.active = [n for n in active if n in self.there and n in there]
        self.merged = merged and bool(self.active)
        if self.there:
            self.sort_active()

    @precondition(lambda self: not self.blocks)
    @rule(how=st.sampled_from([copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]))
    def swap_for_a_copy(self, how: Callable) -> None:
        """From here on a copy of the model is played with; the first must not notice."""
        first, values = self.model, snapshot(self.model)
        shape = original(first)
        self.model = how(first)
        assert same_bits(snapshot(self.model), values)
        if self.there:
            lora.remove(how(self.model))
        assert original(first) == shape
        assert same_bits(snapshot(first), values)
        self.shape = (self.shape[0], [(n, id(p), g) for n, p, g in self.matching()], *self.shape[2:])

    def matching(self) -> list[tuple[str, nn.Parameter, bool]]:
        own = {n: p for n, p in self.model.named_parameters(remove_duplicate=False) if ".lora." not in n}
        return [(n, own[n], grad) for n, _, grad in self.shape[1]]


class VerbsInBf16(Verbs):
    dtype = torch.bfloat16


EXAMPLES = settings(
    max_examples=15,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking a failure takes minutes; print_blob shows the steps anyway
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestVerbs = Verbs.TestCase
TestVerbs.settings = EXAMPLES
TestVerbsInBf16 = VerbsInBf16.TestCase
TestVerbsInBf16.settings = settings(EXAMPLES, max_examples=8)


@pytest.fixture
def model() -> nn.Module:
    found = Net()
    lora.inject(found, r=2, targets=["0", "2"], name="a", train=["norm"])
    randomize(found, seed=1)
    lora.inject(found, r=3, targets=["0", "1"], name="b")
    return randomize(found, seed=2)


def test_what_trains_does_not_follow_what_acts(model: nn.Module) -> None:
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    for names in ("a", None, ["b", "a"], "b"):
        lora.activate(model, names)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    with lora.disabled(model):
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_gradients_reach_only_what_acts(model: nn.Module) -> None:
    lora.activate(model, "b")
    model(X).sum().backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    assert grads == {f"layers.{i}.lora.b.{t}" for i in (0, 1) for t in "AB"}


def test_remove_one_of_two_keeps_the_other_to_the_bit(model: nn.Module) -> None:
    lora.activate(model, "b")
    wanted = model(X)
    lora.activate(model, ["a", "b"])
    lora.remove(model, "a")
    assert torch.equal(model(X), wanted)
    assert not any(".a." in key for key in model.state_dict())
    assert type(model.norm) is nn.LayerNorm
    assert type(model.layers[2]) is Conv1D


def test_remove_restores_requires_grad_of_the_first_inject() -> None:
    model = Net()
    before = original(model)
    lora.inject(model, targets=["0"], name="a")
    lora.inject(model, targets=["1"], name="b")
    lora.remove(model, "a")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora." not in n)
    lora.remove(model, "b")
    assert original(model) == before


def test_removed_within_disabled_stays_away(model: nn.Module) -> None:
    with lora.disabled(model):
        lora.remove(model, "b")
    assert lora.summary(model).acting == []
    with lora.disabled(model):
        lora.remove(model)
    assert not list(hosts(model))
    assert original(model)[0] == original(Net())[0]


def test_removed_within_disabled_of_a_merged_model(model: nn.Module) -> None:
    lora.activate(model, ["a", "b"])
    lora.merge(model)
    with lora.disabled(model):
        lora.remove(model, "a")
    assert lora.summary(model).merged
    lora.remove(model)
    assert same_bits(snapshot(model), snapshot(Net()))


def test_merge_that_cannot_come_back_after_disabled_leaves_the_model_unmerged(model: nn.Module) -> None:
    lora.merge(model)
    with pytest.raises(LoraError, match="NaN"), lora.disabled(model):
        model.layers[0].lora["b"].A.data[0, 0] = torch.nan
    assert not lora.summary(model).merged
    lora.remove(model)
    assert same_bits(snapshot(model), snapshot(Net()))


# Models of other people


def acts(model: nn.Module, x: Tensor) -> bool:
    """Whether every adapter parameter of the model has a gradient: an adapter that is passed by has none."""
    randomize(model)
    model(x).float().sum().backward()
    grads = {n: p.grad is not None for n, p in model.named_parameters() if p.requires_grad}
    assert grads
    return all(grads.values())


class OwnBias(nn.Module):
    """A block with a bias of its own beside the linear inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + self.bias


@pytest.mark.parametrize("root", [True, False])
def test_bias_all_in_a_block_around_a_target_acts(root: bool) -> None:
    model = OwnBias() if root else nn.Sequential(nn.Linear(6, 6), OwnBias())
    with contextlib.suppress(LoraError):  # refusing is as good as acting
        lora.inject(model, targets=["lin"], bias="all")
    assert not list(hosts(model)) or acts(model, X)


def test_two_adapters_on_a_block_and_inside_it_act_or_are_refused() -> None:
    for first, second in (({"train": ["block"]}, {"bias": "all"}), ({"bias": "all"}, {"train": ["block"]})):
        block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6))
        model = nn.Sequential(OrderedDict(lin=nn.Linear(6, 6), block=block))
        lora.inject(model, targets=["lin"], name="a", **first)
        keys = list(model.state_dict())
        try:
            lora.inject(model, targets=["lin"], name="b", **second)
            lora.activate(model, ["a", "b"])
        except LoraError:
            assert list(model.state_dict())[: len(keys)] == keys
            continue
        assert not any(key.count(".lora.") > 1 for key in model.state_dict())
        assert acts(model, X)


def test_forward_hooks_of_a_module_trained_whole_run_once() -> None:
    model = Net()
    calls = []
    model.norm.register_forward_hook(lambda module, args, out: calls.append(1) or out * 2)
    model.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    before = model(X)
    lora.inject(model, targets=["0"], train=["norm"])
    calls.clear()
    assert torch.equal(model(X), before)  # a fresh adapter changes no bit
    assert len(calls) == 1


def test_an_attribute_named_lora_is_refused_not_overwritten() -> None:
    for which in ({"targets": ["0"]}, {"targets": ["1"], "train": ["norm"]}, {"targets": ["1"], "bias": "all"}):
        for value in ("mine", nn.Linear(2, 2), nn.Parameter(torch.zeros(2))):
            model = Net()
            (model.layers[0] if which["targets"] == ["0"] else model.norm).lora = value
            before = original(model)
            with pytest.raises(LoraError, match="`lora`"):
                lora.inject(model, **which)
            assert original(model) == before


def test_a_class_that_cannot_be_subclassed_leaves_the_model_whole() -> None:
    class Final(nn.Linear):
        def __init_subclass__(cls, **keywords: object) -> None:
            raise TypeError("this class is final")

    model = nn.Sequential(nn.Linear(6, 6), Final(6, 6))
    before = original(model)
    with pytest.raises((LoraError, TypeError)):
        lora.inject(model, targets=["0", "1"])
    assert original(model) == before


def test_a_shared_module_is_found_by_either_name() -> None:
    for target in ("first", "second"):
        model = nn.ModuleDict({"first": nn.Linear(6, 6)})
        model["second"] = model["first"]
        lora.inject(model, targets=[target])
        assert len(list(hosts(model))) == 1


def test_lazy_and_scripted_modules_are_refused_in_words() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(LoraError, match="0"):
        lora.inject(model, targets=["0"])
    with pytest.raises(LoraError):
        lora.inject(torch.jit.script(nn.Sequential(nn.Linear(4, 4))), targets=["0"])


def test_training_a_module_without_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    before = original(model)
    with pytest.raises(LoraError, match="train"):
        lora.inject(model, targets=["0"], train=["1"])
    assert original(model) == before


def test_an_uncalled_linear_of_multihead_attention_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    for targets in (["out_proj"], "all-linear"):
        with pytest.raises(LoraError, match="MultiheadAttention"):
            lora.inject(model, targets=targets)
    lora.inject(model, targets="all-linear", exclude=["out_proj"])
    assert [n for n, _, _ in hosts(model)] == ["1"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (2, 3, 4, 6)], ids=str)
def test_inputs_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    lora.inject(model, r=2, targets="all-linear")
    randomize(model)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = model(x)
    assert y.shape == (*shape[:-1], 3)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    flat = model(x.reshape(-1, 6)).view_as(y)
    torch.testing.assert_close(y, flat, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_non_contiguous_weights_and_inputs() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].weight = nn.Parameter(torch.randn(6, 12)[:, ::2])
    assert not model[0].weight.is_contiguous()
    storage = model[0].weight.untyped_storage()
    around = torch.as_strided(model[0].weight.data, (72,), (1,)).clone()
    before = snapshot(model)
    lora.inject(model, targets=["0"])
    randomize(model)
    x = torch.randn(6, 9).t()
    update = model[0].lora["default"]
    wanted = nn.functional.linear(x.double(), before["0.weight"].double(), before["0.bias"].double())
    wanted = wanted + update.scaling * x.double() @ update.A.double().t() @ update.B.double().t()
    torch.testing.assert_close(model(x).double(), wanted, rtol=1e-5, atol=1e-6)
    lora.merge(model)
    torch.testing.assert_close(model(x).double(), wanted, rtol=1e-5, atol=1e-6)
    assert model[0].weight.untyped_storage().data_ptr() == storage.data_ptr()
    lora.unmerge(model)
    lora.remove(model)
    assert same_bits(snapshot(model), before)
    assert torch.equal(torch.as_strided(model[0].weight.data, (72,), (1,)), around)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_wrapped_models_are_seen_through(wrap: Callable, tmp_path: Path) -> None:
    inner = Net()
    if wrap is nn.DataParallel:
        before = original(inner)
        with pytest.raises(LoraError, match="add them, then wrap it"):
            lora.inject(wrap(inner), r=2, targets=["0", "head"])
        model = wrap(lora.inject(inner, r=2, targets=["0", "head"]))
    else:
        model = wrap(inner)
        before = original(inner)
        assert lora.inject(model, r=2, targets=["0", "head"]) is model
    randomize(inner)
    lora.save(model, tmp_path)
    lora.merge(model)
    assert lora.summary(model).merged
    with lora.disabled(model):
        assert same_bits({k: v for k, v in snapshot(inner).items() if ".lora." not in k}, snapshot(Net()))
    lora.unmerge(model)
    lora.activate(model, None)
    lora.remove(model)
    assert original(inner) == before
    lora.load(inner, tmp_path)  # names without the wrapper's prefix
    assert [n for n, _, _ in hosts(inner)] == ["layers.0", "head"]


def test_a_compiled_module_within_keeps_plain_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[0] = torch.compile(model[0])
    plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with contextlib.suppress(LoraError):  # a refusal that names the reason is fine too
        lora.inject(model, targets="all-linear")
        lora.save(model, tmp_path)
        lora.load(plain, tmp_path, check=False)
        assert [n for n, _, _ in hosts(plain)] == ["0", "1"]


def test_adapters_may_be_called_as_they_like() -> None:
    model = Net()
    before = original(model)
    names = [
        "forward",
        "train",
        "active",
        "terms",
        "records",
        "undo",
        "original",
        "A",
        "lora",
        "weight",
        "0",
        "-",
        "__init__",
    ]
    for name in names:
        lora.inject(model, r=1, targets=["0"], name=name)
        randomize(model)
    lora.activate(model, names)
    assert acts(model, X)
    with tempfile.TemporaryDirectory() as folder:
        lora.save(model, folder)
        lora.remove(model)
        for name in names:
            lora.load(model, Path(folder) / name, name)
    lora.activate(model, names)
    lora.merge(model)
    lora.remove(model)
    assert original(model) == before


def test_parametrized_linear_computes_or_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    before = model(X)
    with contextlib.suppress(LoraError):
        lora.inject(model, targets=["0"])
        assert torch.equal(model(X), before)
        assert acts(model, X)
        lora.remove(model)
        nn.utils.parametrize.remove_parametrizations(model[0], "weight")
        torch.testing.assert_close(model(X), before)


def test_inject_under_inference_mode_is_refused_or_trains() -> None:
    model = Net()
    with contextlib.suppress(LoraError):
        with torch.inference_mode():
            lora.inject(model, targets=["0"])
        assert acts(model, X)


def test_batchnorm_trained_whole_keeps_its_statistics_apart(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

    model = build().train()
    before = snapshot(model)
    lora.inject(model, targets=["0"], train=["1"])
    randomize(model)
    model(X)
    lora.save(model, tmp_path)
    wanted = model.eval()(X)
    other = lora.load(build().eval(), tmp_path)
    assert torch.equal(other(X), wanted)
    lora.remove(model)
    assert same_bits(snapshot(model), before)
