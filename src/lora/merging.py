"""merge and unmerge: fold the update into W0 in fp32, round once, and give W0 back bit for bit."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from .bases import Dense, forget_quantization, into_names
from .errors import LoraError, LoraWarning
from .exact.checks import Place, changed, check_finite, check_places, kept_and_noise, moments, refuse_overflow
from .exact.patch import Digest, LinearUndo, Patch, row_blocks
from .exact.replaced import Replaced, check_into, check_unchanged, leave, merge_quantized, put_back
from .layers import LinearAdapters, WholeAdapters
from .layers.frozen import model_dtype
from .layers.host import hosts, refresh
from .ops import low_rank_product, summed_bias
from .report import MergedModule, MergeReport
from .resident import acting, drop, is_merged, resident, unwrap

KEPT_FLOOR = 0.99
"""A merge warns when less than this share of an update survives the rounding."""

SURVIVED_FLOOR = 0.5
"""A merge that quantizes again is refused when less than this share of an update survives."""


def merge(
    model: nn.Module, *, unload: bool = False, into: str | None = None, force: bool = False
) -> MergeReport:  # fmt: skip
    """Fold the acting adapters into the weights, in place: W = round(W0 + sum of s B A), summed in fp32, rounded once.

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
        LoraError: nothing acts, merged already, NaN or infinity in A, B or the result, a tied or a meta weight; an
            `into` that the base is not, or under which less than half of an update survives. The model is then as it
            was.
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
    if into is not None and into not in into_names():
        raise LoraError(f"into: got {into!r}; allowed are None (a 16-bit layer), {', '.join(map(repr, into_names()))}")
    idle = [name for name in resident(root) if name not in names]
    if unload and idle:
        raise LoraError(f"unload: would drop {', '.join(idle)} unmerged; lora.remove them or activate them first")
    report = MergeReport(merge_acting(root, into))
    gone = [m for m in report.modules if m.quantized and m.survived < SURVIVED_FLOOR]
    if gone and not force:
        unmerge(root)
        worst = min(gone, key=lambda m: m.survived)
        raise LoraError(
            f"into: of {len(gone)} of {len(report.modules)} updates less than {SURVIVED_FLOOR:.0%} would survive in "
            f"{into}, the least {worst.survived:.1%} ({worst.name}); nothing was changed. Use into=None for 16-bit "
            "layers, serve the adapter beside its base, or pass force=True"
        )
    if unload:
        _unload(root, names)
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


def _unload(root: nn.Module, names: list[str]) -> None:
    plain = []
    for name, host, adapters in hosts(root):
        if isinstance(adapters, LinearAdapters) and getattr(adapters.undo, "merged_class", None) is not None:
            leave(host, adapters)
            plain.append(name)
        adapters.undo = None
    drop(root, names)
    if plain:
        forget_quantization(root, plain)


def unmerge(model: nn.Module) -> None:
    """Take a merge back, in place: every weight is W0 again, bit for bit, and the same adapters act.

    Raises:
        LoraError: not merged, or a weight, A or B changed since the merge. The model is then as it was.
    """
    root = unwrap(model)
    merged = [(name, host, adapters) for name, host, adapters in hosts(root) if adapters.undo is not None]
    if not merged:
        raise LoraError("model: it is not merged; there is nothing to take back")
    _all_or_none(merged, _unmerge_host, partial(_merge_host, how=(merged_into(root), model_dtype(root))))


def merge_acting(root: nn.Module, into: str | None = None) -> list[MergedModule]:
    """Merge what acts, whole or not at all; nothing at all may act."""
    targets = [(name, host, adapters) for name, host, adapters in hosts(root) if adapters.active]
    linears = [(name, host, adapters) for name, host, adapters in targets if isinstance(adapters, LinearAdapters)]
    if into is not None and not any(adapters.quantized for _, _, adapters in linears):
        raise LoraError(f"into: got {into!r}, but no target is quantized; merge, save, and quantize what was saved")
    for place in linears:
        check_into(*place, into)
    check_finite(targets)
    check_places(root, targets)
    return _all_or_none(targets, partial(_merge_host, how=(into, model_dtype(root))), _unmerge_host)


def merged_into(root: nn.Module) -> str | None:
    """What quantized hosts of a merged model were merged into."""
    return next((a.undo.into for _, _, a in hosts(root) if isinstance(a.undo, Replaced)), None)


T = TypeVar("T")
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


def _merge_host(place: Place, swapped: set[int], how: tuple[str | None, torch.dtype | None]) -> MergedModule:
    name, host, adapters = place
    if isinstance(adapters, WholeAdapters):
        result = _swap_whole(name, host, adapters, swapped)
        adapters.undo = True
    else:
        assert isinstance(adapters, LinearAdapters)
        if adapters.quantized:
            result, adapters.undo = merge_quantized(name, host, adapters, _update_blocks(adapters), *how)
        else:
            result, adapters.undo = _merge_linear(name, host, adapters)
    refresh(host)
    return result


def _unmerge_host(place: Place, swapped: set[int]) -> None:
    name, host, adapters = place
    if isinstance(adapters, WholeAdapters):
        _swap_whole(name, host, adapters, swapped)
    else:
        assert isinstance(adapters, LinearAdapters)
        if adapters.quantized:
            check_unchanged(name, host, adapters)
            put_back(host, adapters.frozen, adapters.undo)
        else:
            _unmerge_linear(name, host, adapters)
    adapters.undo = None
    refresh(host)


@torch.no_grad()
def _merge_linear(name: str, host: nn.Module, adapters: LinearAdapters) -> tuple[MergedModule, LinearUndo]:
    weight = adapters.frozen
    old_weight = weight.dense()
    dtype = old_weight.dtype
    digest, patches = Digest(), []
    old_rows: list[tuple[slice, Tensor]] = []
    new_rows: list[tuple[slice, Tensor]] = []
    sums = torch.zeros(3, dtype=torch.float64)
    for rows, update in _update_blocks(adapters):
        old = old_weight[rows].clone(memory_format=torch.contiguous_format)
        new = (old + update).to(dtype)
        refuse_overflow(name, new)
        digest.add(old)
        patches.append(Patch(old, _way_back(new, update)))
        old_rows.append((rows, old))
        new_rows.append((rows, new))
        sums += moments(new.to(update.dtype) - old, update)
    old_bias = new_bias = None
    if any(term.bias is not None for term in adapters.terms):
        old_bias = host.get_parameter("bias").detach().clone()
        new_bias = summed_bias(old_bias, adapters.terms)
        refuse_overflow(name, new_bias)
    _write_all(host, adapters, new_rows, new_bias, otherwise=(old_rows, old_bias))
    undo = LinearUndo(dtype, digest.value, patches, old_bias, new_bias)
    return MergedModule(name, weight.shape, dtype, *kept_and_noise(sums)), undo


@torch.no_grad()
def _unmerge_linear(name: str, host: nn.Module, adapters: LinearAdapters) -> None:
    undo = adapters.undo
    merged = adapters.frozen.dense()
    bias = host._parameters["bias"]
    digest = Digest()
    old_rows: list[tuple[slice, Tensor]] = []
    new_rows: list[tuple[slice, Tensor]] = []
    same_bias = undo.merged_bias is None or (bias is not None and torch.equal(bias, undo.merged_bias.to(bias.device)))
    if merged.dtype == undo.dtype and same_bias:
        for (rows, update), patch in zip(_update_blocks(adapters), undo.patches, strict=True):
            new = patch.apply_(_way_back(merged[rows], update))
            digest.add(new)
            old_rows.append((rows, merged[rows].clone()))
            new_rows.append((rows, new))
    if digest.value != undo.digest:
        raise changed(name, merged.dtype, undo.dtype)
    _write_all(host, adapters, new_rows, undo.bias, otherwise=(old_rows, undo.merged_bias))


def _way_back(merged: Tensor, update: Tensor) -> Tensor:
    """round(W - D), contiguous: W0 but for a few places. In float64, where the last bits of D depend on the order of
    summation, W itself: the patch then holds W0 whole."""
    back = merged if merged.dtype == torch.float64 else (merged - update).to(merged.dtype)
    return back.clone(memory_format=torch.contiguous_format)


def _write_all(
    host: nn.Module,
    adapters: LinearAdapters,
    rows: list[tuple[slice, Tensor]],
    bias: Tensor | None,
    otherwise: tuple[list[tuple[slice, Tensor]], Tensor | None],
) -> None:
    """Write the rows of the weight and the bias; where that fails or is interrupted, write the other ones back."""
    frozen = adapters.frozen
    assert isinstance(frozen, Dense)
    try:
        if bias is not None:
            host.get_parameter("bias").copy_(bias)
        for place, values in rows:
            frozen.write_(place, values)
    except BaseException:
        if otherwise[1] is not None:
            host.get_parameter("bias").copy_(otherwise[1])
        for place, values in otherwise[0]:
            frozen.write_(place, values)
        raise


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
