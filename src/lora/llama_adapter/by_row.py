"""rows: another LLaMA-Adapter, or none, for each row of a batch."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..atomic import alone, later_interrupts, whole_or_not
from ..config import check_name
from ..errors import LoraError, LoraWarning, near
from ..layers import base_modules, hosts, set_rows
from ..layers.host import activate as activate_host
from ..resident import acting, activate_all, refuse_merged, resident, unwrap


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within the block each row of a batch has the adapter of its name, or none; afterwards what acted acts.

    Low-rank adapters that act go on acting on all rows. Generation repeats each name with its row, for beams and
    `num_return_sequences`.

    Args:
        names: for each row the name of a LLaMA-Adapter, or None for the base.

    Raises:
        LoraError: a name that is no LLaMA-Adapter of the model, one that trains more than prompts, a merged model.
    """
    if not isinstance(names, Sequence) or isinstance(names, str) or not names:
        raise LoraError(f"names: got {names!r}; a list of a name or None for each row")
    root = unwrap(model)
    if root.training and _reentrant(root):
        warnings.warn(
            "model: its checkpoints are reentrant and compute layers again in backward, with the rows of then: "
            "call backward() within the block, or lora.prepare(model), whose checkpoints raise an error instead",
            LoraWarning, stacklevel=3,
        )  # fmt: skip
    entered = _Entered(list(names))
    try:
        try:
            with alone():
                whole_or_not(root, lambda _: entered.enter(root))
            yield model
        finally:
            entered.leave(root)
    except BaseException:
        entered.leave(root)  # where an interrupt came before the first one was done
        raise


def _reentrant(root: nn.Module) -> bool:
    """Whether a layer is computed again by torch's older checkpoints, which notice no other rows."""
    functions: list[Any] = [
        getattr(module, "_gradient_checkpointing_func", None)
        for _, module in base_modules(root) if getattr(module, "gradient_checkpointing", False) is True
    ]  # fmt: skip
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


class _Entered:
    """What was before a block of `rows`."""

    def __init__(self, names: list[str | None]) -> None:
        self.names = names
        self.before: dict[nn.Module, tuple[str, ...]] | None = None
        self.outer: Sequence[str | None] | None = None

    def enter(self, root: nn.Module) -> None:
        chosen = list(dict.fromkeys(name for name in self.names if name is not None))
        prompts = _prompts(root)
        for name in chosen:
            if check_name(name) not in prompts:
                known = "trains more than prompts, which all rows share" if name in resident(root) else "is not there"
                raise LoraError(f"names: {name!r} {known}; give LLaMA-Adapters of the model{near(name, prompts)}")
        refuse_merged(root)
        before = {host: adapters.active for _, host, adapters in hosts(root)}
        activate_all(root, [*(name for name in acting(root) if name not in prompts), *chosen])
        self.outer = set_rows(root, self.names)
        self.before = before

    def leave(self, root: nn.Module) -> None:
        """Once."""
        if self.before is not None:
            with later_interrupts(), alone():
                whole_or_not(root, lambda _: self._back(root))
                self.before = None

    def _back(self, root: nn.Module) -> None:
        set_rows(root, self.outer)
        for _, host, _ in hosts(root):
            activate_host(host, (self.before or {}).get(host, ()))


def _prompts(root: nn.Module) -> list[str]:
    """The adapters of which nothing acts but by row."""
    whole = {name for _, _, adapters in hosts(root) if not adapters.by_row for name in adapters.records}
    return [name for name in resident(root) if name not in whole]
