"""Which adapters act, and how they leave."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from .atomic import alone, later_interrupts, whole_or_not
from .config import check_name
from .errors import LoraError, near
from .exact import Journal
from .layers import hosts
from .layers.host import activate as activate_host
from .merging import merge_acting, merged_into, unmerge_all
from .resident import acting, activate_all, check_root, drop, is_merged, named, refuse_merged, resident, unwrap


def activate(model: nn.Module, names: str | Iterable[str] | None) -> None:
    """Choose the adapters that act: one name, several (their updates add), or None for the base alone.

    Which adapters train is a separate matter (their parameters' `requires_grad`) and stays as it is.

    Raises:
        LoraError: an unknown name, two adapters that train the same module whole, a merged model.
    """
    root = unwrap(model)
    chosen = [] if names is None else [names] if isinstance(names, str) else list(names)
    with alone():
        there = resident(root)
        for name in chosen:
            if check_name(name) not in there:
                known = f"the model has no adapter {name!r}{near(name, there)}"
                raise LoraError(f"names: {known}; lora.load or lora.inject it")
        if len(set(chosen)) != len(chosen):
            raise LoraError(f"names: got {chosen!r}, with a name twice; list each adapter once")
        refuse_merged(root)
        for host_name, _, adapters in hosts(root):
            adapters.check_together(host_name, [name for name in chosen if name in adapters])
        whole_or_not(root, lambda _: activate_all(root, chosen))


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is its base. Afterwards all is as before: what acted, and what was merged.

    A merged model is unmerged for the block and merged again after it, each to the bit. An interrupt on the way into
    the block leaves all as it was; on the way out it comes when all is as it was.
    """
    root = unwrap(model)
    entered = _Entered()
    try:
        try:
            whole_or_not(root, lambda journal: entered.enter(root, journal))
            yield model
        finally:
            entered.leave(root)
    except BaseException:
        entered.leave(root)  # where an interrupt came before the first one was done
        raise


class _Entered:
    """What was before a block of `disabled`."""

    def __init__(self) -> None:
        self.before: dict[nn.Module, tuple[str, ...]] | None = None
        self.merged = False
        self.into: str | None = None

    def enter(self, root: nn.Module, journal: Journal) -> None:
        self.merged, self.into = is_merged(root), merged_into(root)
        before = {host: adapters.active for _, host, adapters in hosts(root)}
        unmerge_all(root, journal)
        activate_all(root, [])
        self.before = before

    def leave(self, root: nn.Module) -> None:
        """Once. Adapters that came meanwhile do not act. What cannot be merged again acts, and the error is raised."""
        if self.before is None:
            return
        with later_interrupts():
            try:
                whole_or_not(root, lambda journal: self._back(root, journal, self.merged))
            except LoraError:
                whole_or_not(root, lambda journal: self._back(root, journal, False))
                self.before = None
                raise
            self.before = None

    def _back(self, root: nn.Module, journal: Journal, merged: bool) -> None:
        unmerge_all(root, journal)
        for _, host, _ in hosts(root):
            activate_host(host, (self.before or {}).get(host, ()))
        if merged and acting(root):
            merge_acting(root, journal, self.into)


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter (None: all of them) out of the model, in place. What is merged is unmerged first, if it is of it.

    After the last one the model is as it was before `inject`: classes, weights, state-dict keys, requires_grad.

    Raises:
        LoraError: no such adapter, or none at all.
    """
    root = unwrap(model)

    def change(journal: Journal) -> None:
        if set(names) & set(acting(root)):
            unmerge_all(root, journal)
        drop(root, names)

    with alone():
        names = named(root, name, "to remove")
        check_root(root)
        whole_or_not(root, change)
