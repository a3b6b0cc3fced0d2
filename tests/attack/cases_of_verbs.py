"""Small models of every kind of host, and every verb over them: what is interrupted."""

import functools
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import lora
from conftest import randomize
from lora.layers import hosts, plan


class Siblings(nn.Module):
    """q, k and v of one input, and what follows them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        self.out = nn.Linear(4, 3)

    @staticmethod
    def fused() -> Any:
        """For the length of a block, the fused path runs on a CPU."""
        return patch.multiple(plan, DEVICES=("cpu", "cuda"), DTYPES=(torch.float32,), HAS_TRITON=True)

    def compute(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.q_proj(x) * self.k_proj(x) + self.v_proj(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        with self.fused():
            return self.compute(x)


class Words(nn.Module):
    """A table, a norm and a head, which may read the same tensor."""

    supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def __init__(self, tied: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mid = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=not tied)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.to(dtype)

    def gradient_checkpointing_enable(self, keywords: dict[str, Any]) -> None:
        self.gradient_checkpointing = True

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.lm_head(self.norm(self.mid(self.embed(ids))))
        return y


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4, bias=False))


def quantized(kind: str) -> nn.Module:
    """Three linears of which the last is no target."""
    from quantized_base import linear as of

    model = nn.Sequential(of(kind, 64, 64), nn.Tanh(), of(kind, 64, 64), of(kind, 64, 64)).to("cpu")
    with torch.no_grad():
        model.train(kind != "int8")(torch.ones(1, 64))  # the first pass settles dtypes, and in eval mode int8's scales
    return model.train()


IDS = torch.tensor([[1, 4, 9], [0, 2, 2]])
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Tensor]] = {
    "linear": (linear, {"targets": ["0", "2"], "bias": "lora_only", "dropout": 0.2}, torch.ones(2, 6) / 3),
    "groups": (Siblings, {"targets": ["q_proj", "k_proj", "v_proj"]}, torch.ones(2, 6) / 3),
    "whole": (lambda: Words(False), {"targets": ["mid"], "train": ["lm_head"], "bias": "all"}, IDS),
    "tied": (lambda: Words(True), {"targets": ["mid"], "train": ["embed", "lm_head"]}, IDS),
    "embedding": (lambda: Words(False), {"targets": ["embed", "mid"]}, IDS),
    "dora": (linear, {"targets": ["0", "2"], "dora": True}, torch.ones(2, 6) / 3),
    "nf4": (lambda: quantized("nf4"), {"targets": ["0", "2"], "bias": "lora_only"}, torch.ones(2, 64) / 3),
    "int8": (lambda: quantized("int8"), {"targets": ["0", "2"]}, torch.ones(2, 64) / 3),
}


@dataclass
class Subject:
    """A model and a verb about to be called on it. folder: what `save` writes to; block: of `disabled`."""

    model: nn.Module
    run: Callable[[nn.Module], Tensor]
    settings: dict[str, Any]
    folder: Path | None = None
    block: Any = None
    verb: Callable[[], object] = field(default=lambda: None)

    def inject(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        lora.inject(self.model, r=2, name=name, **self.settings)
        randomize(self.model, seed=seed)


@dataclass(frozen=True)
class Case:
    """A verb over a model. start: the stage that it starts from; allowed: the states that it may be interrupted in."""

    model: str
    verb: str
    start: str
    call: Callable[[Subject], object]
    allowed: tuple[str, ...] = ("before", "after")

    @property
    def name(self) -> str:
        return f"{self.model}-{self.verb}"

    def build(self, home: Path) -> Subject:
        """The same each time, to the bit. home: an empty folder."""
        make, settings, x = MODELS[self.model]
        torch.manual_seed(0)
        subject = Subject(make(), lambda model: model(x), settings)
        stage(subject, self.start)
        if self.verb.startswith("save"):
            subject.folder = home
            shutil.copytree(saved(self.model), home, dirs_exist_ok=True)
        if "exit" in self.verb:
            subject.block = lora.disabled(subject.model)
            subject.block.__enter__()
        if self.verb == "merge_refused":
            last = [adapters for _, _, adapters in hosts(subject.model)][-1]
            for parameter in last[last.active[0]].parameters():
                parameter.data.fill_(1e30)
        subject.verb = functools.partial(self.call, subject)
        torch.manual_seed(7)
        return subject


def stage(subject: Subject, name: str) -> None:
    """raw: no adapter; one: adapter a acts; two: a and b are there, b acts; merged: a is merged."""
    if name != "raw":
        subject.inject("a", 1)
    if name == "two":
        subject.inject("b", 2)
    if name == "merged":
        merge(subject)


def merge(subject: Subject, **keywords: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora.LoraWarning)
        lora.merge(subject.model, **keywords)


@functools.cache
def _homes() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def saved(model: str) -> Path:
    """An adapter of this model on disk, of other values than its case has."""
    subject = Case(model, "none", "raw", lambda s: None).build(Path())
    subject.inject("a", 3)
    path = Path(_homes().name) / model
    lora.save(subject.model, path)
    return path


def _load(name: str) -> Callable[[Subject], object]:
    def call(subject: Subject) -> object:
        model = next(key for key, value in MODELS.items() if value[1] is subject.settings)
        return lora.load(subject.model, saved(model), name)

    return call


def _inject(name: str) -> Callable[[Subject], object]:
    return lambda subject: lora.inject(subject.model, r=2, name=name, **subject.settings)


def _both(subject: Subject) -> object:
    return lora.activate(subject.model, "a" if "train" in subject.settings else ["a", "b"])


def _enter(subject: Subject) -> object:
    subject.block = lora.disabled(subject.model)
    return subject.block.__enter__()


def _exit(subject: Subject) -> object:
    return subject.block.__exit__(None, None, None)


VERBS: dict[str, tuple[str, Callable[[Subject], object], tuple[str, ...]]] = {
    "inject": ("raw", _inject("a"), ("before", "after")),
    "inject_beside": ("one", _inject("b"), ("before", "after")),
    "load": ("raw", _load("a"), ("before", "after")),
    "load_beside": ("one", _load("b"), ("before", "after")),
    "activate": ("two", _both, ("before", "after")),
    "activate_none": ("two", lambda s: lora.activate(s.model, None), ("before", "after")),
    "disabled_enter": ("two", _enter, ("before",)),  # whose block is never left, when it raised
    "disabled_exit": ("two", _exit, ("after",)),  # nobody calls it again
    "disabled_merged_enter": ("merged", _enter, ("before",)),
    "disabled_merged_exit": ("merged", _exit, ("after",)),
    "merge": ("one", merge, ("before", "after")),
    "merge_unload": ("one", lambda s: merge(s, unload=True), ("before", "after")),
    "merge_refused": ("one", merge, ("before",)),
    "unmerge": ("merged", lambda s: lora.unmerge(s.model), ("before", "after")),
    "remove": ("two", lambda s: lora.remove(s.model, "b"), ("before", "after")),
    "remove_last": ("one", lambda s: lora.remove(s.model), ("before", "after")),
    "remove_merged": ("merged", lambda s: lora.remove(s.model), ("before", "after")),
    "save": ("one", lambda s: lora.save(s.model, s.folder), ("before", "after")),
    "save_merged": ("merged", lambda s: lora.save(s.model, s.folder), ("before", "after")),
}


def _prepare(subject: Subject) -> object:
    return lora.prepare(subject.model, norms_fp32=True, head_dtype=torch.float32)


def cases() -> list[Case]:
    """Every verb over every model."""
    found = [
        Case(model, verb, *rest) for model in MODELS for verb, rest in VERBS.items() if not _impossible(model, verb)
    ]
    for kind in ("nf4", "int8"):
        call = functools.partial(merge, into=kind, force=True)
        found.append(Case(kind, "merge_into", "one", call))
    return found + [Case("words16", verb, start, _prepare) for verb, start in PREPARED.items()]


PREPARED = {"prepare": "raw", "prepare_beside": "one"}
MODELS["words16"] = (lambda: Words(False, torch.bfloat16), {"targets": ["mid"]}, IDS)


def _impossible(model: str, verb: str) -> bool:
    """What no user can do either."""
    return model == "words16" or (verb == "merge_refused" and model in ("tied", "whole", "dora"))
