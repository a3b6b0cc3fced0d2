"""merge and unmerge: fold the update into W0 in fp32, round once, and give W0 back bit for bit."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from .errors import LoraError, LoraWarning
from .layers import LinearAdapters, WholeAdapters
from .layers.base import Adapters, base_modules, hosts, refresh
from .layers.linear import shifted_bias
from .ops import low_rank_product
from .resident import acting, drop, is_merged, resident, unwrap
from .undo import Digest, Patch, row_blocks

KEPT_FLOOR = 0.99
"""A merge warns when less than this share of an update survives the rounding."""


@dataclass(frozen=True)
class MergedModule:
    """What became of one module's update D in the weight's dtype, W being the merged weight.

    kept: <W - W0, D> / <D, D>: the share of the update that the merged weight has, along the update's direction.
    noise: |(W - W0) - D| / |D|: the rounding error beside the update.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: float
    noise: float


@dataclass(frozen=True)
class MergeReport:
    """One entry a module; `print(report)` shows a table, the modules that kept least first."""

    modules: list[MergedModule]

    @property
    def kept(self) -> float:
        """The least share of an update that any module kept."""
        return min((m.kept for m in self.modules), default=1.0)

    def __str__(self) -> str:
        from .report import size, table

        worst_first = sorted(self.modules, key=lambda m: m.kept)
        rows = [[m.name, size(m.shape), f"{m.dtype}"[6:], f"{m.kept:.2%}", f"{m.noise:.2%}"] for m in worst_first]
        return table(["module", "shape", "dtype", "update kept", "rounding noise"], rows)


@dataclass
class LinearUndo:
    """What turns a merged linear back: patches by row block, the checksum of W0's bits, the old bias."""

    dtype: torch.dtype
    digest: int
    patches: list[Patch]
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(patch.nbytes for patch in self.patches) + (0 if self.bias is None else self.bias.nbytes)


def merge(model: nn.Module, *, unload: bool = False) -> MergeReport:
    """Fold the acting adapters into the weights, in place: W = round(W0 + sum of s B A), summed in fp32, rounded once.

    A merged layer runs its own bare operation. `unmerge` gives W0 back bit for bit.

    Args:
        unload: also drop the adapters, so that a plain model remains; there is no way back then.

    Returns:
        A report with the share of each update that survived the rounding; `print` it for a table.

    Raises:
        LoraError: nothing acts, merged already, NaN or infinity in A, B or the result, a tied or a meta weight.
            The model is then as it was.
    Warns:
        LoraWarning: a module kept less than 99 % of its update.
    """
    root = unwrap(model)
    if is_merged(root):
        raise LoraError("model: its adapters are merged already; call lora.unmerge(model) first")
    names = acting(root)
    if not names:
        raise LoraError(
            f"model: no adapter acts, so there is nothing to merge; it has {list(resident(root)) or 'none'}"
        )
    idle = [name for name in resident(root) if name not in names]
    if unload and idle:
        raise LoraError(f"unload: would drop {', '.join(idle)} unmerged; lora.remove them or activate them first")
    report = MergeReport(merge_acting(root))
    if unload:
        for _, _, adapters in hosts(root):
            adapters.undo = None
        drop(root, names)
    lossy = [m for m in report.modules if m.kept < KEPT_FLOOR]
    if lossy:
        worst = min(lossy, key=lambda m: m.kept)
        warnings.warn(
            f"merge: {len(lossy)} of {len(report.modules)} modules kept less than {KEPT_FLOOR:.0%} of their update in "
            f"{str(worst.dtype)[6:]}; the least is {worst.kept:.1%} ({worst.name}). Print the report for all, or merge "
            "into a float32 copy of the base",
            LoraWarning,
            stacklevel=2,
        )
    return report


def unmerge(model: nn.Module) -> None:
    """Take a merge back, in place: every weight is W0 again, bit for bit, and the same adapters act.

    Raises:
        LoraError: not merged, or a weight, A or B changed since the merge. The model is then as it was.
    """
    root = unwrap(model)
    merged = [(name, host, adapters) for name, host, adapters in hosts(root) if adapters.undo is not None]
    if not merged:
        raise LoraError("model: it is not merged; there is nothing to take back")
    _all_or_none(merged, _unmerge_host, _merge_host)


def merge_acting(root: nn.Module) -> list[MergedModule]:
    """Merge what acts, whole or not at all; nothing at all may act."""
    targets = [(name, host, adapters) for name, host, adapters in hosts(root) if adapters.active]
    _check_finite(targets)
    _check_places(root, targets)
    return _all_or_none(targets, _merge_host, _unmerge_host)


T = TypeVar("T")
Place = tuple[str, nn.Module, Adapters]
Step = Callable[[Place, set[int]], T]
"""What is done at one place; the set has the tensors that are exchanged already."""


def _all_or_none(places: Iterable[Place], do: "Step[T]", back: "Step[object]") -> list[T]:
    """Do a step at every place; where one fails, take the ones done back and raise."""
    done: list[Place] = []
    results: list[T] = []
    swapped: set[int] = set()
    try:
        for place in places:
            results.append(do(place, swapped))
            done.append(place)
    except BaseException:
        swapped = set()
        for place in reversed(done):
            back(place, swapped)
        raise
    return results


def _merge_host(place: Place, swapped: set[int]) -> MergedModule:
    name, host, adapters = place
    if isinstance(adapters, WholeAdapters):
        result = _swap_whole(name, host, adapters, swapped)
        adapters.undo = True
    else:
        assert isinstance(adapters, LinearAdapters)
        result, adapters.undo = _merge_linear(name, host, adapters)
    refresh(host)
    return result


def _unmerge_host(place: Place, swapped: set[int]) -> None:
    name, host, adapters = place
    if isinstance(adapters, WholeAdapters):
        _swap_whole(name, host, adapters, swapped)
    else:
        assert isinstance(adapters, LinearAdapters)
        _unmerge_linear(name, host, adapters)
    adapters.undo = None
    refresh(host)


@torch.no_grad()
def _merge_linear(name: str, host: nn.Module, adapters: LinearAdapters) -> tuple[MergedModule, LinearUndo]:
    weight = adapters.frozen
    old_weight = weight.dense()
    digest, patches, merged = Digest(), [], []
    sums = torch.zeros(3, dtype=torch.float64)
    for rows, update in _update_blocks(adapters):
        old = old_weight[rows].contiguous()
        new = (old + update).to(old.dtype)
        if not torch.isfinite(new).all():
            raise LoraError(f"model: merging {name!r} overflows {old.dtype}; nothing was changed. Merge in float32")
        digest.add(old)
        patches.append(Patch(old, (new - update).to(old.dtype)))
        merged.append((rows, new))
        change = (new.to(update.dtype) - old).double()
        sums += torch.stack(
            [(change * update).sum(), update.double().square().sum(), (change - update).square().sum()]
        ).cpu()
    along, norm, lost = sums.tolist()
    bias, old_bias = host._parameters.get("bias"), None
    if bias is not None:
        old_bias = bias.detach().clone()
        bias.copy_(shifted_bias(old_bias, adapters.terms))
    for rows, new in merged:
        weight.write_(rows, new)
    kept, noise = (along / norm, math.sqrt(lost / norm)) if norm else (1.0, 0.0)
    dtype = old_weight.dtype
    return MergedModule(name, weight.shape, dtype, kept, noise), LinearUndo(dtype, digest.value, patches, old_bias)


@torch.no_grad()
def _unmerge_linear(name: str, host: nn.Module, adapters: LinearAdapters) -> None:
    weight, undo = adapters.frozen, adapters.undo
    merged_weight = weight.dense()
    digest, restored = Digest(), []
    if merged_weight.dtype == undo.dtype:
        for (rows, update), patch in zip(_update_blocks(adapters), undo.patches, strict=True):
            old = patch.apply_((merged_weight[rows] - update).to(undo.dtype).contiguous())
            digest.add(old)
            restored.append((rows, old))
    if digest.value != undo.digest:
        raise LoraError(
            f"model: {name!r} cannot be unmerged: its weight, A or B changed after the merge (trained, loaded or cast; "
            f"it was {undo.dtype} and is {merged_weight.dtype}). Put the values back, or load the base model again"
        )
    for rows, old in restored:
        weight.write_(rows, old)
    if undo.bias is not None:
        host.get_parameter("bias").copy_(undo.bias)


def _update_blocks(adapters: LinearAdapters) -> Iterator[tuple[slice, Tensor]]:
    """(rows, D[rows]) over the rows of the weight; D in fp32, or in fp64 for an fp64 weight."""
    weight = adapters.frozen
    device = weight.parameter.device
    dtype = torch.promote_types(weight.parameter.dtype, torch.float32)
    updates = [(t.A.to(device), t.B.to(device), t.scaling) for t in adapters.terms]
    for rows in row_blocks(weight.shape):
        yield rows, low_rank_product(updates, rows, dtype)


def _swap_whole(name: str, host: nn.Module, adapters: WholeAdapters, swapped: set[int]) -> MergedModule:
    """Exchange the values of the base's tensors with those of the acting copy; tied ones only once."""
    copy = adapters.terms[-1].module
    theirs = dict(host.named_parameters()) | dict(host.named_buffers())
    own = [(n, t) for n, t in [*copy.named_parameters(), *copy.named_buffers()] if t is not theirs[n]]
    for n, mine in own:
        if id(mine) not in swapped:
            swapped.add(id(mine))
            mine.data, theirs[n].data = theirs[n].data, mine.data
    first = own[0][1]
    return MergedModule(name, tuple(first.shape), first.dtype, 1.0, 0.0)


def _check_finite(places: Iterable[Place]) -> None:
    for name, _, adapters in places:
        for adapter in adapters.active:
            for parameter_name, parameter in adapters[adapter].named_parameters():
                if parameter.is_meta:
                    raise LoraError(f"model: {name!r} is on the meta device and has no values; load them, then merge")
                if not torch.isfinite(parameter).all():
                    raise LoraError(
                        f"model: {parameter_name} of adapter {adapter!r} on {name!r} has NaN or infinity; nothing was "
                        "merged. Train again from the last good adapter, or lora.remove this one"
                    )


def _check_places(root: nn.Module, places: Iterable[Place]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in base_modules(root):
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{parameter_name}")
    for name, _, adapters in places:
        if isinstance(adapters, LinearAdapters):
            if adapters.frozen.parameter.is_meta:
                raise LoraError(f"model: the weight of {name!r} is on the meta device; load it, then merge")
            tied = owners[id(adapters.frozen.parameter)]
            if len(tied) > 1:
                raise LoraError(
                    f"model: {' and '.join(tied)} are one tied tensor, and merging would change both; untie them first "
                    "(a clone of the weight for one of them), or keep the adapter unmerged"
                )
