"""merge and unmerge: fold the update into W0 in fp32, round once, and give W0 back bit for bit."""

import warnings

import torch
from torch import Tensor, nn

from .atomic import alone, whole_or_not
from .bases import forget_quantization, into_names
from .errors import LoraError, LoraWarning
from .exact import How, Journal, MergedModule, MergeReport
from .layers import Kind, base_modules, hosts
from .layers.frozen import model_dtype
from .resident import acting, drop, is_merged, refuse_merged, refuse_sharded, resident, unwrap

KEPT_FLOOR = 0.99  # a merge warns where less than this share of an update survives the rounding
SURVIVED_FLOOR = 0.5  # one that quantizes again is refused where less than this share does
Place = tuple[str, nn.Module, Kind]  # full name, host, its adapters


def merge(
    model: nn.Module, *, unload: bool = False, into: str | None = None, force: bool = False
) -> MergeReport:  # fmt: skip
    """Fold the acting adapters into the weights, in place: W = round(W0 + D), summed in fp32, rounded once.

    A merged layer runs its own bare operation. `unmerge` gives W0 back bit for bit. A quantized linear becomes a plain
    one, in the dtype of the model around it, from the dequantized weight plus the update.

    Args:
        unload: also drop the adapters, so that a plain model remains; there is no way back then.
        into: "nf4", "fp4" or "int8": quantize the sum again, as the base is quantized, instead. Most of a fine-tuned
            update is smaller than the steps of such a code and vanishes.
        force: accept that less than half of an update survives `into`.

    Returns:
        A report with the share of each update that survived the rounding; `print` it for a table.

    Raises:
        LoraError: nothing acts, merged already, NaN or infinity in A, B or the result, a tied, a sharded or a meta
            weight; an `into` that the base is not, or under which less than half of an update survives. The model is
            then as it was.
    Warns:
        LoraWarning: a module kept less than 99 % of its update.
    """
    root = unwrap(model)
    refuse_sharded(model, writing=True)
    with alone():
        refuse_merged(root)
        names, there = acting(root), list(resident(root))
        if not names:
            raise LoraError(f"model: no adapter acts, so there is nothing to merge; it has {there or 'none'}")
        known = into_names()
        if into is not None and into not in known:
            raise LoraError(f"into: got {into!r}; allowed are None (a 16-bit layer), {', '.join(map(repr, known))}")
        idle = [name for name in there if name not in names]
        if unload and idle:
            raise LoraError(f"unload: would drop {', '.join(idle)} unmerged; lora.remove them or activate them first")
        report = whole_or_not(root, lambda journal: _merge(root, journal, into, unload, force))
    lossy = [m for m in report.modules if m.kept < KEPT_FLOOR]
    if lossy:
        worst = min(lossy, key=lambda m: m.kept)
        advice = "into=None gives 16-bit layers" if worst.quantized else "or merge into a float32 copy of the base"
        warnings.warn(
            f"merge: {len(lossy)} of {len(report.modules)} modules kept less than {KEPT_FLOOR:.0%} of their update in "
            f"{worst.stored}; the least is {worst.kept:.1%} ({worst.name}). Print the report for all, {advice}",
            LoraWarning,
            stacklevel=2,
        )
    return report


def _merge(root: nn.Module, journal: Journal, into: str | None, unload: bool, force: bool) -> MergeReport:
    names = acting(root)
    report = MergeReport(merge_acting(root, journal, into))
    gone = [m for m in report.modules if m.quantized and m.survived < SURVIVED_FLOOR]
    if gone and not force:
        worst = min(gone, key=lambda m: m.survived)
        raise LoraError(
            f"into: of {len(gone)} of {len(report.modules)} updates less than {SURVIVED_FLOOR:.0%} would survive in "
            f"{into}, the least {worst.survived:.1%} ({worst.name}); nothing was changed. Use into=None for 16-bit "
            "layers, serve the adapter beside its base, or pass force=True"
        )
    if unload:
        plain = [name for name, host, adapters in hosts(root) if adapters.leave(host)]
        drop(root, names)
        if plain:
            forget_quantization(root, plain)
    return report


def unmerge(model: nn.Module) -> None:
    """Take a merge back, in place: every weight is W0 again, bit for bit, and the same adapters act.

    Raises:
        LoraError: not merged, or a weight, A or B changed since the merge. The model is then as it was.
    """
    root = unwrap(model)
    refuse_sharded(model, writing=True)
    with alone():
        if not is_merged(root):
            raise LoraError("model: it is not merged; there is nothing to take back")
        whole_or_not(root, lambda journal: unmerge_all(root, journal))


def unmerge_all(root: nn.Module, journal: Journal) -> None:
    """Take the merge back, where there is one."""
    merged = [place for place in hosts(root) if place[2].undo is not None]
    how = How(journal, merged_into(root), model_dtype(root)) if merged else How(journal)
    for name, host, adapters in merged:
        adapters.unmerge(name, host, how)


def merge_acting(root: nn.Module, journal: Journal, into: str | None = None) -> list[MergedModule]:
    """Merge what acts; nothing at all may act."""
    places = check_mergeable(root, into)
    how = How(journal, into, model_dtype(root))
    return [adapters.merge(name, host, how) for name, host, adapters in places]


def check_mergeable(root: nn.Module, into: str | None = None) -> list[Place]:
    """Refuse what acts and cannot be merged; the hosts that act."""
    places = [place for place in hosts(root) if place[2].active]
    if into is not None and not any(adapters.quantization for _, _, adapters in places):
        raise LoraError(f"into: got {into!r}, but no target is quantized; merge, save, and quantize what was saved")
    for place in places:
        _check(*place, into)
    _check_shared(root, places)
    return places


def merged_into(root: nn.Module) -> str | None:
    """What quantized hosts of a merged model were merged into."""
    undone = [adapters.undo for _, _, adapters in hosts(root) if adapters.undo is not None]
    return next((undo.into for undo in undone if undo.into is not None), None)


def _check(name: str, host: nn.Module, adapters: Kind, into: str | None) -> None:
    """Refuse a host of whose weight each process holds a part, or that or whose adapters cannot be merged."""
    shards = [n for n, p in host.named_parameters() if hasattr(p, "full_tensor")]
    if shards:
        raise LoraError(
            f"model: {shards[0]} of {name!r} is sharded over several processes (FSDP2), and a merge needs the "
            "whole; load the base and the adapter in one process and merge there"
        )
    adapters.check_merge(name, host, into)
    for adapter in adapters.active:
        for parameter_name, parameter in adapters[adapter].named_parameters():
            if parameter.is_meta:
                raise LoraError(f"model: {name!r} is on the meta device and has no values; load them, then merge")
            if not torch.isfinite(parameter).all():
                raise LoraError(
                    f"model: {parameter_name} of adapter {adapter!r} on {name!r} has NaN or infinity; nothing was "
                    "merged. Train again from the last good adapter, or lora.remove this one"
                )


def _check_shared(root: nn.Module, places: list[Place]) -> None:
    """Refuse to write to weights that someone else would see change."""
    owners: dict[int, list[tuple[str, Tensor]]] = {}
    for name, module in base_modules(root):
        for own_name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                owners.setdefault(parameter.untyped_storage().data_ptr(), []).append((f"{name}.{own_name}", parameter))
    for _, host, adapters in places:
        for tensor in adapters.written(host):
            tied = [other for other, p in owners[tensor.untyped_storage().data_ptr()] if _overlap(tensor, p)]
            if len(tied) > 1:
                raise LoraError(
                    f"model: {' and '.join(tied)} are tied (they share memory), and merging would change both; untie "
                    "them first (a clone of the tensor for one of them), or keep the adapter unmerged"
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage lie over each other."""

    def end(t: Tensor) -> int:
        last = sum((length - 1) * step for length, step in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr() + (last + 1) * t.element_size()

    return one.data_ptr() < end(other) and other.data_ptr() < end(one)
