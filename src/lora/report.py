"""Tables for people: what a model carries, and what a merge kept."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from .bases.quantizer import model_dtype
from .bases.weight import weight_of
from .errors import LoraError
from .layers import Adapters, LinearAdapters, LowRank
from .layers.frozen import is_quantized
from .layers.groups import why_not
from .layers.host import base_modules, hosts
from .preparation import prepared
from .resident import acting, is_merged, resident, unwrap
from .tables import size, starred, table

INT8_NOTE = (
    "int8: training multiplies by the dequantized weights and never quantizes activations; in eval mode without "
    "gradients bitsandbytes' LLM.int8() runs"
)


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
    prepared: str = ""
    int8: bool = False

    @property
    def percent(self) -> float:
        return 100 * self.trainable / max(1, self.total)

    def __str__(self) -> str:
        rows = [
            [
                r.adapter,
                r.target,
                r.kind,
                size(r.shape),
                "" if r.r is None else str(r.r),
                r.runs,
                str(r.layers),
                f"{r.parameters:,}",
            ]
            for r in self.rows
        ]
        groups = f"; {self.groups} groups of linears share an input" if self.groups else ""
        state = f"acting: {', '.join(self.acting) or 'none'}{' (merged)' if self.merged else ''}"
        return (
            table(["adapter", "target", "module", "out x in", "r", "runs", "layers", "parameters"], rows)
            + f"\ntrainable {self.trainable:,} of {self.total:,} parameters ({self.percent:.4f} %), "
            + f"{self.bytes / 2**20:,.2f} MiB; {state}{groups}"
            + (f"\nprepared: {self.prepared}" if self.prepared else "")
            + (f"\n{INT8_NOTE}" if self.int8 else "")
        )


@dataclass(frozen=True)
class MergedModule:
    """What became of one module's update D in the weight's dtype, W being the merged weight.

    kept: <W - W0, D> / <D, D>: the share of the update that the merged weight has, along the update's direction.
    noise: |(W - W0) - D| / |D|: the rounding error beside the update.
    quantized: "nf4", "fp4" or "int8" where the sum was quantized again.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: float
    noise: float
    quantized: str | None = None

    @property
    def survived(self) -> float:
        """The lesser of `kept` and the cosine between W - W0 and D: quantizing again can keep an update in the mean
        and bury it under noise many times its size."""
        length = math.sqrt(max(0.0, self.noise**2 + 2 * self.kept - 1))  # |W - W0| / |D|
        return min(self.kept, self.kept / length if length else 1.0)

    @property
    def stored(self) -> str:
        """How the merged weight is stored: a dtype's name, or the quantization."""
        return self.quantized or str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class MergeReport:
    """One entry a module; `print(report)` shows a table, the modules that kept least first."""

    modules: list[MergedModule]

    @property
    def kept(self) -> float:
        """The least share of an update that any module kept."""
        return min((m.kept for m in self.modules), default=1.0)

    def __str__(self) -> str:
        worst_first = sorted(self.modules, key=lambda m: m.kept)
        rows = [[m.name, size(m.shape), m.stored, f"{m.kept:.2%}", f"{m.noise:.2%}"] for m in worst_first]
        return table(["module", "shape", "stored as", "update kept", "rounding noise"], rows)


def summary(model: nn.Module) -> Summary:
    """What the model carries: a row a target, and the trainable and total parameters. Print it for the table.

    Raises:
        LoraError: the model has no adapter.
    """
    root = unwrap(model)
    if not resident(root):
        raise LoraError("model: it has no adapter; call lora.inject(model, ...) or lora.load(model, path) first")
    plain = model_dtype(root)
    grouped: dict[tuple[str, str, str, tuple[int, ...], int | None, str], list[int]] = {}
    for name, host, adapters in hosts(root):
        target = starred(name)
        for adapter in adapters.records:
            part = adapters[adapter]
            trained = [p.numel() for p in part.parameters()]
            if isinstance(part, LowRank):
                shape, r = (part.B.shape[0], part.A.shape[1]), part.r
            else:
                own = dict(part.module.named_parameters())
                trained = [own[n].numel() for n in part.trained]
                shape, r = tuple(own[part.trained[0]].shape), None
            key = (adapter, target, adapters.original.__name__, shape, r, _path(host, adapters, adapter, plain))
            grouped.setdefault(key, []).append(sum(trained))
    trainable = [p for p in root.parameters() if p.requires_grad]
    return Summary(
        rows=[Row(*key, layers=len(counts), parameters=sum(counts)) for key, counts in grouped.items()],
        trainable=sum(p.numel() for p in trainable),
        total=_elements(root),
        bytes=sum(p.nbytes for p in trainable),
        acting=acting(root),
        merged=is_merged(root),
        prepared=prepared(root),
        int8=any(a.frozen.quantization == "int8" for _, _, a in hosts(root, LinearAdapters)),
        groups=len({id(a.group) for _, _, a in hosts(root, LinearAdapters) if a.group is not None}),
    )


def _elements(root: nn.Module) -> int:
    """The parameters' elements, a quantized weight's as many as it stands for; a shared one counts once."""
    counts = {id(p): p.numel() for p in root.parameters()}
    for _, module in base_modules(root):
        if is_quantized(module):
            weight = weight_of(module)
            assert weight is not None
            counts[id(weight.parameter)] = math.prod(weight.shape)
    return sum(counts.values())


def _path(host: nn.Module, adapters: Adapters, adapter: str, plain: torch.dtype | None) -> str:
    """How one adapter's part on a host runs, in words; `plain`: the dtype of the model's activations, where known."""
    if adapters.undo is not None:
        return "merged"
    if adapter not in adapters.active:
        return "idle"
    if not isinstance(adapters, LinearAdapters):
        return "own copy"
    frozen = adapters.frozen
    dtype = plain if plain is not None and frozen.quantization == "int8" else frozen.dtype  # int8 computes in x's
    reason = why_not(host, torch.empty(0, dtype=dtype, device=frozen.parameter.device))
    over = f" over {adapters.frozen.quantization}" if adapters.quantized else ""
    if reason is not None:
        return f"plain torch{over} ({reason})"
    major, _ = torch.cuda.get_device_capability(adapters.frozen.parameter.device)
    if major < 8:
        return f"fused{over}, all by cuBLAS (GPU older than Ampere)"
    return f"fused{over}" if major == 9 else f"fused{over}, dX and dB by cuBLAS (no Hopper GPU)"
