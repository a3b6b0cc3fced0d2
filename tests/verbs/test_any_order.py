"""The verbs in any order: the outputs are the formula's, and the base comes back."""

import contextlib
import copy
import pickle
import tempfile
import warnings
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
from conftest import same_bits, snapshot
from lora import LoraError
from lora.layers import hosts
from small_net import Net, X, original


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
                            mine.get_parameter(n).copy_(holder.get_parameter(n) if n in part.trained else p)
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
            leaving = list(self.there) if name is None else [name]
            self.merged = self.merged and not set(leaving) & set(self.active)  # an idle one leaves a merged one alone
            for gone in leaving:
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
