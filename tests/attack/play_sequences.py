"""Random verbs on a small model, beside plain float64 matrices that know nothing of the library.

The book has every A, B and magnitude that was written into the model, drawn here; outputs and gradients are the
formula's, computed from the book alone.
"""

import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from conftest import same_bits, snapshot
from lora import LoraError
from lora.layers import hosts

HOSTS = ("table", "first", "second")
BASES = ("float32", "float32", "nf4", "int8")


class Net(nn.Module):
    """A table and two linears."""

    def __init__(self, base: str, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        if base == "float32":
            self.first, self.second = nn.Linear(width, width), nn.Linear(width, 5, bias=False)
        else:
            from quantized_base import linear

            self.first, self.second = linear(base, width, width), linear(base, width, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(self.table(ids))))
        return y


@dataclass
class Part:
    """One adapter on one host, in float64: A (r, in), B (out, r), s, m (out,) or None, the trained bias or None."""

    leaves: dict[str, Tensor]
    scaling: float
    dropout: float

    def act(self, x: Tensor, y0: Tensor, W0: Tensor, mask: Tensor | float) -> Tensor:
        """What it adds to y0 = x W0^T: c (y0 + s (mask x) A^T B^T) - y0."""
        A, B = self.leaves["A"], self.leaves["B"]
        added = self.scaling * (x * mask) @ A.t() @ B.t()
        if "magnitude" not in self.leaves:
            return added
        norms = (W0 + self.scaling * B @ A).detach().norm(dim=1)
        return self.leaves["magnitude"] / norms * (y0 + added) - y0


@dataclass
class Kept:
    """An adapter: its parts by host, and whether it trains."""

    parts: dict[str, Part]
    trains: bool
    settings: dict[str, Any] = field(default_factory=dict)


class Player:
    """A model, the book of what should be, and the verbs. `log`: what was played."""

    def __init__(self, seed: int, home: Path) -> None:
        self.random, self.home, self.log = random.Random(seed), home, [f"seed {seed}"]
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.base = self.random.choice(BASES)
        width = 6 if self.base == "float32" else 64
        self.model = Net(self.base, width).to("cpu").train()
        self.weights = self._weights()
        self.bits = snapshot(self.model)
        self.classes = [type(m) for m in self.model.modules()]
        self.ids = torch.randint(0, 11, (7,), generator=self.generator)
        self.book: dict[str, Kept] = {}
        self.active: list[str] = []
        self.merged = False
        self.blocks: list[tuple[Any, list[str], bool]] = []
        self.files: list[tuple[Path, Kept]] = []
        self.count = 0

    def _weights(self) -> dict[str, Tensor]:
        found = {"table": self.model.table.weight.detach().double().t()}
        for name in ("first", "second"):
            module = self.model.get_submodule(name)
            if self.base == "float32":
                found[name] = module.weight.detach().double().clone()
            else:
                from quantized_base import values

                found[name] = values(module).double()
        return found

    # What should be

    def expected(self, masks: bool) -> Tensor:
        """(7, out), in float64. masks: draw dropout's, in the order in which the plain path draws them."""
        x = F.one_hot(self.ids, 11).double()
        for host in HOSTS:
            W0 = self.weights[host]
            bias = getattr(self.model.get_submodule(host), "bias", None)
            y = y0 = x @ W0.t()
            acting = [self.book[name].parts[host] for name in self.active if host in self.book[name].parts]
            for part in acting:
                width = 1 if host == "table" else x.shape[1]
                p = part.dropout if masks else 0.0
                mask = F.dropout(torch.ones(len(x), width), p).double() if p else 1.0
                y = y + part.act(x, y0, W0, mask)
            if bias is not None:
                own = self.bits[f"{host}.bias"].double()
                y = y + own + sum((p.leaves["bias"] - own for p in acting if "bias" in p.leaves), torch.zeros(()))
            x = torch.tanh(y) if host == "first" else y
        return x

    def check(self) -> None:
        """A forward and a backward pass are the formula's."""
        dropped = any(part.dropout for name in self.active for part in self.book[name].parts.values())
        masks = dropped and not self.merged
        self.model.train(self.base != "nf4" or not masks)  # the operator's masks are not torch's
        if masks and self.base == "int8":
            assert self.model(self.ids).isfinite().all()  # in eval mode its activations are quantized
            return
        found = self._seeded(lambda: self.model(self.ids))
        exact = self._seeded(lambda: self.expected(masks and self.base == "float32"))
        self.model.train()
        error = ((found.double() - exact).norm() / exact.norm()).item()
        assert error < 2e-5, f"output off by {error:.1e}"
        leaves = self.leaves()
        if self.merged or not leaves:
            return
        weigh = torch.randn(exact.shape, generator=self.generator)
        wanted = torch.autograd.grad((exact * weigh).sum(), [own for _, own in leaves])
        got = torch.autograd.grad((found * weigh).sum(), [mine for mine, _ in leaves])
        largest = max(exact_one.norm().item() for exact_one in wanted)
        for mine, exact_one in zip(got, wanted, strict=True):
            miss = (mine.double() - exact_one).norm().item()
            assert miss < 2e-5 * (exact_one.norm().item() + largest), f"gradient off by {miss:.1e} of {largest:.1e}"

    def _seeded(self, call: Callable[[], Tensor]) -> Tensor:
        torch.manual_seed(len(self.log))
        return call()

    def leaves(self) -> list[tuple[Tensor, Tensor]]:
        """(the model's, the book's) parameters of what acts and trains."""
        found = []
        for name in self.active:
            for host, part in self.book[name].parts.items() if self.book[name].trains else ():
                mine = self._part(name, host)
                found += [(mine.get_parameter(key), leaf) for key, leaf in part.leaves.items()]
        return found

    def _part(self, name: str, host: str) -> Any:
        return next(adapters[name] for n, _, adapters in hosts(self.model) if n == host)

    # The verbs

    def play(self) -> None:
        verbs = [self.inject, self.inject, self.train, self.train, self.activate, self.merge, self.merge, self.unmerge]
        verbs += [self.remove, self.save, self.load, self.enter, self.leave]
        verb = self.random.choice(verbs)
        self.log.append(verb.__name__)
        verb()
        if self.random.random() < 0.7:
            self.check()

    def refused(self, call: Callable[[], object]) -> None:
        before = snapshot(self.model)
        self.log[-1] += " (refused)"
        with pytest.raises(LoraError):
            call()
        assert same_bits(snapshot(self.model), before)

    def _name(self) -> str:
        self.count += 1
        return f"n{self.count}"

    def inject(self) -> None:
        if self.merged or len(self.book) == 3:
            if self.merged:
                self.refused(lambda: lora.inject(self.model, r=2, targets=["first"], name="no"))
            return
        pick, name = self.random, self._name()
        targets = pick.sample(HOSTS, pick.randint(1, 3))
        dora = pick.random() < 0.3
        settings = {
            "r": pick.randint(1, 4), "alpha": pick.choice([1, 3.5, 8]), "rslora": pick.random() < 0.3,
            "dropout": pick.choice([0.0, 0.0, 0.4]), "bias": pick.choice(["none", "lora_only"]), "dora": dora,
        }  # fmt: skip
        lora.inject(self.model, targets=targets, name=name, **settings)
        parts = {}
        for host in HOSTS:
            if host in targets:
                own = self._part(name, host)
                leaves = {key: p.detach().double().requires_grad_() for key, p in own.named_parameters()}
                scaling = settings["alpha"] / (settings["r"] ** 0.5 if settings["rslora"] else settings["r"])
                parts[host] = Part(leaves, scaling, settings["dropout"])
        self.book[name] = Kept(parts, True, settings)
        self.active = [name]
        self.train()

    def train(self) -> None:
        """A step: the same new values into the model's parameters and into the book's."""
        if self.merged:
            return
        with torch.no_grad():
            for mine, own in self.leaves():
                step = 0.2 * torch.randn(own.shape, generator=self.generator)
                value = (own + step).float()
                mine.copy_(value)
                own.copy_(value)

    def activate(self) -> None:
        names = self.random.sample(sorted(self.book), self.random.randint(0, len(self.book)))
        if self.merged:
            return self.refused(lambda: lora.activate(self.model, names))
        lora.activate(self.model, names or None)
        self.active = names

    def merge(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lora.LoraWarning)
            if self.merged or not self.active:
                return self.refused(lambda: lora.merge(self.model))
            lora.merge(self.model)
        self.merged = True

    def unmerge(self) -> None:
        if not self.merged:
            return self.refused(lambda: lora.unmerge(self.model))
        lora.unmerge(self.model)
        self.merged = False

    def remove(self) -> None:
        if not self.book:
            return self.refused(lambda: lora.remove(self.model))
        name = self.random.choice([*sorted(self.book), None])
        lora.remove(self.model, name)
        for gone in list(self.book) if name is None else [name]:
            del self.book[gone]
        self.active = [n for n in self.active if n in self.book]
        self.merged = bool(self.book) and lora.summary(self.model).merged

    def save(self) -> None:
        if not self.book:
            return self.refused(lambda: lora.save(self.model, self.home / "no"))
        name = self.random.choice(sorted(self.book))
        folder = self.home / str(len(self.files))
        lora.save(self.model, folder, name)
        self.files.append((folder, self._copy(self.book[name], trains=True)))

    def load(self) -> None:
        if not self.files or len(self.book) == 3:
            return
        folder, kept = self.random.choice(self.files)
        if self.merged:
            return self.refused(lambda: lora.load(self.model, folder, "no"))
        name, trains = self._name(), self.random.random() < 0.5
        lora.load(self.model, folder, name, trainable=trains)
        self.book[name], self.active = self._copy(kept, trains), [name]

    @staticmethod
    def _copy(kept: Kept, trains: bool) -> Kept:
        parts = {}
        for host, part in kept.parts.items():
            leaves = {key: leaf.detach().clone().requires_grad_() for key, leaf in part.leaves.items()}
            parts[host] = Part(leaves, part.scaling, part.dropout)
        return Kept(parts, trains, kept.settings)

    def enter(self) -> None:
        if len(self.blocks) == 2:
            return
        block = lora.disabled(self.model)
        block.__enter__()
        self.blocks.append((block, self.active, self.merged))
        self.active, self.merged = [], False

    def leave(self) -> None:
        if not self.blocks:
            return
        block, active, merged = self.blocks.pop()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lora.LoraWarning)
            block.__exit__(None, None, None)
        self.active = [name for name in active if name in self.book]
        self.merged = merged and bool(self.active)

    def finish(self) -> None:
        """Everything leaves, and the base is the one that came, to the bit."""
        while self.blocks:
            self.leave()
        if self.book:
            lora.remove(self.model)
        assert [type(m) for m in self.model.modules()] == self.classes
        assert same_bits(snapshot(self.model), self.bits)


def play(seed: int, steps: int = 30) -> Player:
    """One sequence. Raises AssertionError with what was played."""
    with tempfile.TemporaryDirectory() as home:
        player = Player(seed, Path(home))
        try:
            for _ in range(steps):
                player.play()
            player.finish()
        except Exception as error:
            raise AssertionError(f"{player.base}: {', '.join(player.log)}: {type(error).__name__}: {error}") from error
    return player
