"""The summary: what a model carries, how much of it trains, and how it runs."""

import math
from dataclasses import dataclass

from torch import nn

from .bases import is_quantized, weight_of
from .errors import LoraError
from .layers import base_modules, hosts
from .layers.frozen import model_dtype
from .preparation import prepared
from .resident import acting, is_merged, refuse_sharded, resident, unwrap
from .tables import size, starred, table


@dataclass(frozen=True)
class Row:
    """The parts of one adapter on modules of one name and shape; `layers` of them, layer numbers shown as *."""

    adapter: str
    target: str
    kind: str
    shape: tuple[int, ...]
    r: int | None
    runs: str
    layers: int
    parameters: int


@dataclass(frozen=True)
class Summary:
    """`print(lora.summary(model))` shows it. Counts are of elements, bytes of the trainable parameters."""

    rows: list[Row]
    trainable: int
    total: int
    bytes: int
    acting: list[str]
    merged: bool
    groups: int
    prepared: str
    notes: list[str]

    @property
    def percent(self) -> float:
        return 100 * self.trainable / max(1, self.total)

    def __str__(self) -> str:
        rows = [
            [r.adapter, r.target, r.kind, size(r.shape), str(r.r or ""), r.runs, str(r.layers), f"{r.parameters:,}"]
            for r in self.rows
        ]
        groups = f"; {self.groups} groups of linears share an input" if self.groups else ""
        state = f"acting: {', '.join(self.acting) or 'none'}{' (merged)' if self.merged else ''}"
        return (
            table(["adapter", "target", "module", "out x in", "r", "runs", "layers", "parameters"], rows)
            + f"\ntrainable {self.trainable:,} of {self.total:,} parameters ({self.percent:.4f} %), "
            + f"{self.bytes / 2**20:,.2f} MiB; {state}{groups}"
            + (f"\nprepared: {self.prepared}" if self.prepared else "")
            + "".join(f"\n{note}" for note in self.notes)
        )


def summary(model: nn.Module) -> Summary:
    """What the model carries: a row a target, and the trainable and total parameters. Print it for the table.

    Raises:
        LoraError: the model has no adapter.
    """
    root = unwrap(model)
    refuse_sharded(model)
    if not resident(root):
        raise LoraError("model: it has no adapter; call lora.inject(model, ...) or lora.load(model, path) first")
    plain = model_dtype(root)
    grouped: dict[tuple[str, str, str, tuple[int, ...], int | None, str], list[int]] = {}
    for name, host, adapters in hosts(root):
        for adapter in adapters.records:
            shape, r, parameters, note = adapters.line(adapters[adapter])
            acts = "merged" if adapters.undo is not None else adapters.runs(host, plain)
            runs = acts if adapter in adapters.active else "idle"
            key = (adapter, starred(name), f"{adapters.original.__name__} {note}".rstrip(), shape, r, runs)
            grouped.setdefault(key, []).append(parameters)
    trainable = [p for p in root.parameters() if p.requires_grad]
    notes = [note for _, _, adapters in hosts(root) for note in adapters.notes()]
    return Summary(
        rows=[Row(*key, layers=len(counts), parameters=sum(counts)) for key, counts in grouped.items()],
        trainable=sum(p.numel() for p in trainable), total=_elements(root), bytes=sum(p.nbytes for p in trainable),
        acting=acting(root), merged=is_merged(root), prepared=prepared(root), notes=list(dict.fromkeys(notes)),
        groups=len({id(a.group) for _, _, a in hosts(root) if a.group is not None}),
    )  # fmt: skip


def _elements(root: nn.Module) -> int:
    """The parameters' elements, a quantized weight's as many as it stands for; a shared one counts once."""
    counts = {id(p): p.numel() for p in root.parameters()}
    for _, module in base_modules(root):
        if is_quantized(module):
            weight = weight_of(module)
            assert weight is not None
            counts[id(weight.parameter)] = math.prod(weight.shape)
    return sum(counts.values())
