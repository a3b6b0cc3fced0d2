"""Linears that are fed one tensor, computed together as one operator."""

from collections.abc import Iterable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.tuning import card
from ..ops import as_dtype, summed_bias
from ..ops.operator import fused_linear
from ..ops.plan import Shape, describe
from ..ops.plan import plan as steps
from .host import adapters_of
from .matrix import stretched
from .plan import plan

SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of siblings that are usually fed the same tensor; each call confirms it."""

MANY = 8192  # rows of the input for which the summary tells what runs
State = tuple[tuple[str, ...], bool, bool, tuple[int, ...]]
"""active adapters, training mode, gradients recorded, versions of the tensors"""


class Group:
    """Hosts that are fed one tensor. The first called computes for all, the others collect what is theirs.

    A member called with another tensor dissolves the group, and everyone computes alone from then on. Nothing is held
    once the last member has collected. Each thread collects what it computed itself.
    """

    def __init__(self, members: list[nn.Module]) -> None:
        self.members = members
        # By thread: the input, and the results by place among the members.
        self.ready: dict[int, tuple[Tensor, dict[int, tuple[Tensor, State]]]] = {}

    def collect(self, host: nn.Module, x: Tensor) -> Tensor:
        """y for this host; the caller has checked that the host is one to fuse."""
        place = self.members.index(host)
        thread = 0 if torch.compiler.is_compiling() else get_ident()
        held, ready = self.ready.pop(thread, (x, {}))
        if place in ready:
            y, state = ready.pop(place)
            if x is not held or state != _state(host, x):
                self.dissolve()
                return compute([host], x)[0]
        else:
            together = [m for m in self.members if m is host or _joins(m, host, x)]
            outputs = dict(zip(together, compute(together, x), strict=True))
            y = outputs.pop(host)
            others = ready if x is held else {}  # of members that this one cannot run with
            ready = others | {self.members.index(m): (its, _state(m, x)) for m, its in outputs.items()}
        if ready:
            self.ready[thread] = x, ready
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "ready": {}}  # a copy starts with nothing to collect

    def dissolve(self) -> None:
        self.ready = {}
        for member in self.members:
            adapters: Any = adapters_of(member)
            if adapters is not None:
                adapters.group = None


def _state(host: nn.Module, x: Tensor) -> State:
    """What a result depends on beside the input's identity: if any of it changes, the result is not collected."""
    adapters = _adapters(host)
    versions: tuple[int, ...] = ()
    if not torch.compiler.is_compiling():  # within one compiled call nothing changes between two members
        tensors = [x, adapters.frozen.parameter, host._parameters["bias"]]
        for term in adapters.terms:
            tensors += term._parameters.values()
        versions = tuple([0 if t is None or t.is_inference() else t._version for t in tensors])
    return adapters.active, host.training, torch.is_grad_enabled(), versions


def form(hosts: Iterable[tuple[str, nn.Module, Any]]) -> None:
    """Group the hosts of linears that are siblings, have one input width and are usually fed one tensor."""
    siblings: dict[str, dict[str, nn.Module]] = {}
    for name, host, _ in hosts:
        parent, _, leaf = name.rpartition(".")
        siblings.setdefault(parent, {})[leaf] = host
    for children in siblings.values():
        for leaves in SHARED_INPUT:
            members = [children[leaf] for leaf in leaves if leaf in children]
            if len(members) > 1 and len({_adapters(m).frozen.shape[1] for m in members}) == 1:
                group = Group(members)
                for member in members:
                    _adapters(member).group = group


def compute(hosts: list[nn.Module], x: Tensor) -> list[Tensor]:
    """y of each host for one input, as one operator: one shrink, one dA, one sum for dx."""
    all_adapters = [_adapters(host) for host in hosts]
    pairs = [[pair for term in adapters.terms for pair in term.pairs()] for adapters in all_adapters]
    biases = [summed_bias(host._parameters["bias"], _adapters(host).terms) for host in hosts]
    stored = [adapters.frozen.stored() for adapters in all_adapters]
    first = all_adapters[0]
    dtype = first.frozen.compute_dtype(x)
    cast = [None if bias is None else as_dtype(bias, dtype) for bias in biases]
    ys = fused_linear(
        as_dtype(x, dtype),
        [tensor for tensors, _ in stored for tensor in tensors],
        None if cast[0] is None else [b for b in cast if b is not None],
        [[A for A, _, _ in target] for target in pairs],
        [[B for _, B, _ in target] for target in pairs],
        [[s for _, _, s in target] for target in pairs],
        dropout=first.terms[0].dropout if hosts[0].training else 0.0,
        formats=";".join(text for _, text in stored) if first.quantized else "",
    )
    if first.scaled:
        scales = [adapters.terms[0].output_scale(adapters.frozen) for adapters in all_adapters]
        ys = [stretched(y, c, bias) for y, c, bias in zip(ys, scales, cast, strict=True)]
    return [as_dtype(y, adapters.frozen.output_dtype(x)) for y, adapters in zip(ys, all_adapters, strict=True)]


def words(host: nn.Module, adapters: Any, x: Tensor) -> str:
    """How a host runs for an input like x, for people: its plan, and what a training step of `MANY` rows runs on."""
    path, why = plan(host, adapters, x)
    over = f" over {adapters.frozen.quantization}" if adapters.quantized else ""
    if path != "fused":
        return f"plain torch{over} ({why})"
    group: Group | None = adapters.group
    members = [host] if group is None else [m for m in group.members if m is host or _joins(m, host, x)]
    targets = tuple((_adapters(m).frozen.shape[0], sum(term.r for term in _adapters(m).terms)) for m in members)
    masked, device = any(term.dropout for term in adapters.terms), card(x.device)
    size = adapters.frozen.compute_dtype(x).itemsize
    shape = Shape(MANY, adapters.frozen.shape[1], targets, masked, size, device.major, device.processors)
    return f"fused{over}" + describe(steps(shape)).removeprefix("fused")


def _joins(member: nn.Module, host: nn.Module, x: Tensor) -> bool:
    """Whether a member can be computed together with the host that was called."""
    mine: Any = adapters_of(host)
    its: Any = adapters_of(member)
    if its is None or not its.terms or its.undo is not None or member.training != host.training:
        return False
    own, weight = mine.frozen.parameter, its.frozen.parameter
    if type(weight) is not type(own) or weight.dim() != own.dim():
        return False  # FSDP has gathered the host that was called, and not yet this one
    if plan(member, its, x).path != "fused" or its.frozen.parameter.device != x.device or its.scaled != mine.scaled:
        return False
    if its.quantized != mine.quantized or its.frozen.compute_dtype(x) != mine.frozen.compute_dtype(x):
        return False
    same_dropout = {t.dropout for t in its.terms} == {t.dropout for t in mine.terms} or not host.training
    return same_dropout and (member._parameters["bias"] is None) == (host._parameters["bias"] is None)


def _adapters(host: nn.Module) -> Any:
    return host._modules["lora"]
