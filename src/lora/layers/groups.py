"""When a linear runs as one fused operator, and which linears of one input run together."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import add_updates_, as_dtype, summed_bias
from ..ops.dequantize import has_triton
from ..ops.operator import fused_linear
from .frozen import frozen_product
from .host import adapters_of

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


DEVICES = ("cuda",)
HAS_TRITON = has_triton()  # a constant, so that a traced call need not ask
DTYPES = (torch.bfloat16, torch.float16)


State = tuple[tuple[str, ...], bool, bool, tuple[int, ...]]
"""active adapters, training mode, gradients recorded, versions of the tensors"""


class Group:
    """Hosts that are fed one tensor. The first called computes for all, the others collect what is theirs.

    A member called with another tensor dissolves the group, and everyone computes alone from then on. Nothing is held
    once the last member has collected.
    """

    def __init__(self, members: list[nn.Module]) -> None:
        self.members = members
        self.x: Tensor | None = None
        self.ready: dict[int, tuple[Tensor, State]] = {}  # by place among the members

    def collect(self, host: nn.Module, x: Tensor) -> Tensor:
        """y for this host; the caller has checked that the host is one to fuse."""
        place = self.members.index(host)
        if place in self.ready:
            y, state = self.ready.pop(place)
            if x is self.x and state == _state(host, x):
                if not self.ready:
                    self.x = None
                return y
            self.dissolve()
            return compute([host], x)[0]
        together = [m for m in self.members if m is host or _joins(m, host, x)]
        outputs = dict(zip(together, compute(together, x), strict=True))
        y = outputs.pop(host)
        self.ready = {self.members.index(m): (its, _state(m, x)) for m, its in outputs.items()}
        self.x = x if self.ready else None
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "x": None, "ready": {}}  # a copy starts with nothing to collect

    def dissolve(self) -> None:
        self.x, self.ready = None, {}
        for member in self.members:
            adapters: Any = adapters_of(member)
            if adapters is not None:
                adapters.group = None


def _state(host: nn.Module, x: Tensor) -> State:
    """What a result depends on beside the input's identity: if any of it changes, the result is not collected."""
    adapters = _adapters(host)
    versions: tuple[int, ...] = ()
    if not torch.compiler.is_compiling():  # within one compiled call nothing changes between two members
        tensors = [x, adapters.frozen.parameter]
        for term in adapters.terms:
            tensors += term._parameters.values()
        versions = tuple([0 if t is None or t.is_inference() else t._version for t in tensors])
    return adapters.active, host.training, torch.is_grad_enabled(), versions


def form_groups(hosts: Iterable[tuple[str, nn.Module, Any]]) -> None:
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


def why_not(host: nn.Module, x: Tensor) -> str | None:
    """Why this host does not run fused for such an input, in words, or None."""
    adapters = _adapters(host)
    weight = adapters.frozen
    kind, dtype = x.device.type, weight.compute_dtype(x)
    if kind not in DEVICES:
        return f"on {kind}"
    if dtype not in DTYPES:
        return f"{str(dtype)[6:]} compute"
    if adapters.quantized:
        pass  # dequantized to the compute dtype, whichever that is
    elif weight.dtype != dtype or (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype):
        return "autocast over weights of another dtype"
    if not HAS_TRITON:
        return "triton is not installed"
    if host.training and len({term.dropout for term in adapters.terms}) > 1:
        return "active adapters with different dropout"
    return None


def run(host: nn.Module, adapters: Any, x: Tensor) -> Tensor | None:
    """The fused result, or None where the host does not run fused; over a quantized weight always a result."""
    if adapters.quantized and adapters.frozen.runs_own_forward(host, x):
        return separate(host, adapters, x)
    if why_not(host, x) is not None:
        if not adapters.quantized:
            return None
        one_dropout = not host.training or len({term.dropout for term in adapters.terms}) == 1
        return compute([host], x)[0] if one_dropout else separate(host, adapters, x)
    group: Group | None = adapters.group
    return compute([host], x)[0] if group is None else group.collect(host, x)


def separate(host: nn.Module, adapters: Any, x: Tensor) -> Tensor:
    """y of a quantized host in two steps: the frozen product, and the updates on top of it."""
    y = frozen_product(host, adapters.frozen, x)
    for term in adapters.terms:
        if term.bias is not None:
            y = y + (term.bias - host._parameters["bias"]).to(y.dtype)
    updates = [(t.A, t.B, t.scaling, t.dropout if host.training else 0.0) for t in adapters.terms]
    return add_updates_(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), updates).view(y.shape)


def compute(hosts: list[nn.Module], x: Tensor) -> list[Tensor]:
    """y of each host for one input, as one operator: one shrink, one dA, one sum for dx."""
    all_adapters = [_adapters(host) for host in hosts]
    all_terms = [adapters.terms for adapters in all_adapters]
    biases = [summed_bias(h._parameters["bias"], t) for h, t in zip(hosts, all_terms, strict=True)]
    stored = [adapters.frozen.stored() for adapters in all_adapters]
    dtype = all_adapters[0].frozen.compute_dtype(x)
    ys = fused_linear(
        as_dtype(x, dtype),
        [tensor for tensors, _ in stored for tensor in tensors],
        None if biases[0] is None else [as_dtype(b, dtype) for b in biases if b is not None],
        [[t.A for t in terms] for terms in all_terms],
        [[t.B for t in terms] for terms in all_terms],
        [[t.scaling for t in terms] for terms in all_terms],
        dropout=all_terms[0][0].dropout if hosts[0].training else 0.0,
        formats=";".join(text for _, text in stored) if all_adapters[0].quantized else "",
    )
    return [as_dtype(y, adapters.frozen.output_dtype(x)) for y, adapters in zip(ys, all_adapters, strict=True)]


def _joins(member: nn.Module, host: nn.Module, x: Tensor) -> bool:
    """Whether a member can be computed together with the host that was called."""
    mine: Any = adapters_of(host)
    its: Any = adapters_of(member)
    if its is None or not its.terms or its.undo is not None or member.training != host.training:
        return False
    if why_not(member, x) is not None or its.frozen.parameter.device != x.device:
        return False
    if its.quantized and its.frozen.runs_own_forward(member, x):
        return False
    if its.quantized != mine.quantized or its.frozen.compute_dtype(x) != mine.frozen.compute_dtype(x):
        return False
    same_dropout = {t.dropout for t in its.terms} == {t.dropout for t in mine.terms} or not host.training
    return same_dropout and (member._parameters["bias"] is None) == (host._parameters["bias"] is None)


def _adapters(host: nn.Module) -> Any:
    adapters = adapters_of(host)
    assert adapters is not None
    return adapters
