"""Which adapters act, and how they leave."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from .config import check_name
from .errors import LoraError, near
from .layers import hosts
from .layers.host import activate as activate_host
from .merging import merge_acting, merged_into, unmerge
from .resident import acting, activate_all, check_root, drop, is_merged, named, refuse_merged, resident, unwrap


def activate(model: nn.Module, names: str | Iterable[str] | None) -> None:
    """Choose the adapters that act: one name, several (their updates add), or None for the base alone.

    Which adapters train is a separate matter (their parameters' `requires_grad`) and stays as it is.

    Raises:
        LoraError: an unknown name, two adapters that train the same module whole, a merged model.
    """
    root = unwrap(model)
    chosen = [] if names is None else [names] if isinstance(names, str) else list(names)
    there = resident(root)
    for name in chosen:
        if check_name(name) not in there:
            raise LoraError(f"names: the model has no adapter {name!r}{near(name, there)}; lora.load or lora.inject it")
    if len(set(chosen)) != len(chosen):
        raise LoraError(f"names: got {chosen!r}, with a name twice; list each adapter once")
    refuse_merged(root)
    for host_name, _, adapters in hosts(root):
        adapters.check_together(host_name, [name for name in chosen if name in adapters])
    activate_all(root, chosen)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is its base. Afterwards all is as before: what acted, and what was merged.

    A merged model is unmerged for the block and merged again after it, each to the bit.
    """
    root = unwrap(model)
    before = {host: adapters.active for _, host, adapters in hosts(root)}
    merged, into = is_merged(root), merged_into(root)
    if merged:
        unmerge(root)
    activate_all(root, [])
    try:
        yield model
    finally:
        if is_merged(root):
            unmerge(root)
        for _, host, _ in hosts(root):
            activate_host(host, before.get(host, ()))
        if merged and acting(root):
            merge_acting(root, into)


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter (None: all of them) out of the model, in place. A merged model is unmerged first.

    After the last one the model is as it was before `inject`: classes, weights, state-dict keys, requires_grad.

    Raises:
        LoraError: no such adapter, or none at all.
    """
    root = unwrap(model)
    names = named(root, name, "to remove")
    check_root(root)
    if is_merged(root):
        unmerge(root)
    drop(root, names)
