"""One thread runs the model within `lora.steady()` while another calls verbs on it: which outputs come out, and which
are nobody's."""

import argparse
import atexit
import contextlib
import functools
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora
from cases_of_verbs import Siblings
from conftest import randomize
from interrupt import Interrupt
from lora.layers import hosts

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
LAYERS = 6


class Chain(nn.Module):
    """Linears one after the other, so that a forward pass meets one host after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def chain() -> nn.Module:
    """With adapters a and b, of which a acts."""
    forget_blocks()
    model = Chain()
    for seed, name in enumerate("ab", start=1):
        randomize(lora.inject(model, r=2, targets="all-linear", name=name), std=0.5, seed=seed)
    lora.activate(model, "a")
    return model.eval()


@dataclass
class Swap:
    """Two verbs of which the second takes the first back. ways: steps from state to state, round and round."""

    ways: list[Callable[[nn.Module], object]]


def merge(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora.LoraWarning)
        lora.merge(model)


def disable(model: nn.Module) -> None:
    """For the length of nothing."""
    block = lora.disabled(model)
    block.__enter__()
    BLOCKS[id(model)] = block


def enable(model: nn.Module) -> None:
    BLOCKS.pop(id(model)).__exit__(None, None, None)


BLOCKS: dict[int, Any] = {}


def forget_blocks() -> None:
    """End the blocks that nobody left, of models that may be torn by now."""
    for block in BLOCKS.values():
        with contextlib.suppress(Exception):
            block.gen.close()
    BLOCKS.clear()


atexit.register(forget_blocks)
HOME = tempfile.TemporaryDirectory()


def saved() -> Path:
    """Adapter a, on disk."""
    path = Path(HOME.name) / "a"
    if not path.exists():
        lora.save(chain(), path, "a")
    return path


SWAPS: dict[str, Swap] = {
    "activate": Swap([lambda m: lora.activate(m, "b"), lambda m: lora.activate(m, "a")]),
    "activate_several": Swap([lambda m: lora.activate(m, ["a", "b"]), lambda m: lora.activate(m, "a")]),
    "disabled": Swap([disable, enable]),
    "merge": Swap([merge, lora.unmerge]),
    "inject_and_remove": Swap([
        lambda m: lora.inject(m, r=2, targets="all-linear", name="c"),
        lambda m: lora.remove(m, "c"),
        lambda m: lora.activate(m, "a"),
    ]),
    "load": Swap([lambda m: lora.remove(m, "a"), lambda m: lora.load(m, saved(), "a")]),
}  # fmt: skip


def bytes_of(y: Tensor) -> bytes:
    return y.detach().numpy().tobytes()


def outputs(swap: Swap) -> set[bytes]:
    """What the model gives in each of the states."""
    model, found = chain(), set()
    with torch.no_grad():
        for way in swap.ways:
            found.add(bytes_of(model(X)))
            way(model)
        found.add(bytes_of(model(X)))
    return found


def verdict(model: nn.Module, allowed: set[bytes]) -> str:
    """whole: an output of one state; mixed: of none; or the exception that the forward pass ended in."""
    try:
        with lora.steady(), torch.no_grad():
            return "whole" if bytes_of(model(X)) in allowed else "mixed"
    except Exception as error:
        return type(error).__name__


def within_one_forward(name: str, layer: int, patience: float = 0.5) -> str:
    """A verb is called by another thread once a forward pass has come to `layer`: which output comes of it.

    The pass goes on when the verb is done, or after `patience` seconds, where the verb waits for the pass.
    """
    swap = SWAPS[name]
    saved()
    allowed, model = outputs(swap), chain()
    failures: list[BaseException] = []

    def call() -> None:
        try:
            swap.ways[0](model)
        except BaseException as error:
            failures.append(error)

    other = threading.Thread(target=call, daemon=True)

    def hook(module: nn.Module, args: Any) -> None:
        other.start()
        other.join(patience)

    handle = model.layers[layer].register_forward_pre_hook(hook)
    found = verdict(model, allowed)
    handle.remove()
    other.join(60)
    assert not other.is_alive(), f"{name} never came back"
    assert not failures, failures
    assert verdict(model, allowed) == "whole"
    return found


@contextlib.contextmanager
def many_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def race(name: str, rounds: int) -> Counter[str]:
    """Verbs in one thread, forward passes in this one until they are done: how many outputs were whole, and not."""
    swap = SWAPS[name]
    saved()
    allowed, model = outputs(swap), chain()
    counts: Counter[str] = Counter()

    def call() -> None:
        for _ in range(rounds):
            for way in swap.ways:
                try:
                    way(model)
                except Exception as error:
                    counts[f"verb: {type(error).__name__}"] += 1

    other = threading.Thread(target=call, daemon=True)
    with many_switches():
        other.start()
        while other.is_alive():
            counts[verdict(model, allowed)] += 1
        other.join()
    counts["whole at the end" if verdict(model, allowed) == "whole" else "mixed at the end"] += 1
    return counts


class Preempted:
    """Runs `second` in a thread of its own at step `n` of `first`, which goes on when it is done or waits for it.

    came: whether there was a step n. error: what `first` or `second` raised.
    """

    def __init__(self, n: int, first: Callable[[], object], second: Callable[[], object]) -> None:
        self.errors: list[BaseException] = []
        self.second = second
        self.other = threading.Thread(target=self._second, daemon=True)
        interrupt = Interrupt(n, self._act)
        raised = interrupt.run(first)
        self.came, self.place = bool(interrupt.places), "".join(interrupt.places)
        if self.came:
            self.other.join(60)
            assert not self.other.is_alive(), f"at {self.place} the two wait for each other"
        self.errors += [raised] if raised is not None else []

    def _act(self) -> None:
        self.other.start()
        self.other.join(PATIENCE)

    def _second(self) -> None:
        try:
            self.second()
        except BaseException as error:
            self.errors.append(error)

    def refusals(self) -> bool:
        return all(isinstance(error, lora.LoraError) for error in self.errors)


PATIENCE = 0.05
"""Seconds after which a verb or a forward is taken to wait for the other."""


def at_each_step(
    first: Callable[[nn.Module], object], second: Callable[[nn.Module], object],
    fresh: Callable[[], nn.Module], judge: Callable[[nn.Module, Preempted], str], every: int = 1,
) -> Counter[str]:  # fmt: skip
    """`second` on another thread at each step of `first`, each time on a fresh model: how often which verdict."""
    counts: Counter[str] = Counter()
    n = 1
    while True:
        model = fresh()
        played = Preempted(n, functools.partial(first, model), functools.partial(second, model))
        if not played.came:
            return counts
        counts[judge(model, played)] += 1
        n += every


def verb_and_forward(name: str, verb_first: bool, every: int = 1) -> Counter[str]:
    """A forward pass at each step of a verb, or a verb at each step of a forward pass."""
    swap = SWAPS[name]
    saved()
    allowed, seen = outputs(swap), []

    def forward(model: nn.Module) -> None:
        with lora.steady(), torch.no_grad():
            seen.append(bytes_of(model(X)))

    def judge(model: nn.Module, played: Preempted) -> str:
        if played.errors:
            return type(played.errors[0]).__name__
        whole = seen.pop() in allowed and verdict(model, allowed) == "whole"
        return "whole" if whole else "mixed"

    pair = (swap.ways[0], forward) if verb_first else (forward, swap.ways[0])
    return at_each_step(*pair, chain, judge, every)


def verb_and_verb(one: str, other: str, every: int = 1) -> Counter[str]:
    """A verb at each step of another: whether the hosts agree at the end, and the base comes back."""
    saved()
    base = {name: bytes_of(p) for name, p in Chain().named_parameters()}

    def judge(model: nn.Module, played: Preempted) -> str:
        if not played.refusals():
            return "raised " + next(type(e).__name__ for e in played.errors if not isinstance(e, lora.LoraError))
        states = {(a.active, a.undo is None, tuple(a.records)) for _, _, a in hosts(model)}
        if len(states) > 1:
            return "several states"
        try:
            if states:
                lora.remove(model)
        except lora.LoraError:
            return "base lost, and remove refuses"
        return "whole" if {name: bytes_of(p) for name, p in model.named_parameters()} == base else "base lost"

    return at_each_step(SWAPS[one].ways[0], SWAPS[other].ways[0], chain, judge, every)


def two_forwards(every: int = 1) -> Counter[str]:
    """A forward pass of a model with grouped linears at each step of another, on another input: whose outputs come."""
    inputs = [torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    ys: dict[int, Tensor] = {}

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return randomize(lora.inject(Siblings(), r=2, targets=["q_proj", "k_proj", "v_proj"])).eval()

    def forward(place: int, model: nn.Module) -> None:
        with torch.no_grad():
            ys[place] = Siblings.compute(model, inputs[place])

    def judge(model: nn.Module, played: Preempted) -> str:
        if played.errors:
            return type(played.errors[0]).__name__
        if not all(torch.allclose(ys[place], wanted[place], rtol=1e-4, atol=1e-5) for place in (0, 1)):
            return "wrong"
        return "right" if next(hosts(model))[2].group is not None else "right, but the group is dissolved"

    with Siblings.fused():
        for place in (0, 1):
            forward(place, fresh())
        wanted = dict(ys)
        return at_each_step(functools.partial(forward, 0), functools.partial(forward, 1), fresh, judge, every)


PAIRS = [
    ("merge", "merge"), ("merge", "activate"), ("merge", "disabled"), ("disabled", "activate"),
    ("activate", "activate_several"), ("inject_and_remove", "activate"), ("inject_and_remove", "merge"),
    ("load", "activate"), ("load", "inject_and_remove"),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="stop the first thread at every so many steps")
    parser.add_argument("--rounds", type=int, default=300, help="of the races")
    got = parser.parse_args()
    for name in SWAPS:
        print(f"forwards while {name} runs: {dict(race(name, got.rounds))}", flush=True)
    for name in SWAPS:
        for first in (True, False):
            order = f"a forward at each step of {name}" if first else f"{name} at each step of a forward"
            print(f"{order}: {dict(verb_and_forward(name, first, got.every))}", flush=True)
    for one, other in PAIRS:
        print(f"{other} at each step of {one}: {dict(verb_and_verb(one, other, got.every))}", flush=True)
    print(f"a forward at each step of a forward: {dict(two_forwards())}", flush=True)


if __name__ == "__main__":
    main()
