"""What trains nothing is named, once, after the first backward pass of an adapter.

The forward pass has nothing added. Each trained parameter has a hook up to the end of that backward pass.
"""

import warnings
import weakref
from typing import Any

import torch
from torch import nn

from ..config import matches
from ..errors import LoraWarning, ends, listed
from .kind import Kind, Part, hosts

PATIENCE = 8
"""The backward passes in which an expert may have no token, or a layer be dropped at random, before it is named."""


class Watch:
    """Which parts of an adapter have had a gradient. It goes with the hooks that hold it, and a copy has none."""

    def __init__(self, root: nn.Module, adapter: str, parts: list[Part]) -> None:
        self.root, self.adapter = weakref.ref(root), adapter  # nothing here holds a parameter
        self.reached: set[int] = set()
        self.passes: set[int] = set()  # ids of those that have ended
        self.queued: set[int] = set()
        self.hooks: dict[int, list[Any]] = {}
        for _, kind, part in parts:
            trained = [parameter for parameter in kind.trained(part) if parameter.requires_grad]
            hook = self._reach(id(part))
            self.hooks[id(part)] = [p.register_post_accumulate_grad_hook(hook) for p in trained]  # type: ignore[no-untyped-call]

    def _reach(self, part: int) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            self.reached.add(part)
            self.ask()

        return hook

    def ask(self, *_: Any) -> None:
        """Be told of the end of the pass that runs now."""
        task = torch._C._current_graph_task_id()
        if task not in self.queued:
            self.queued.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(self.end)

    def end(self) -> None:
        node: Any = torch._C._current_autograd_node()
        if node is not None:  # a checkpoint's own pass, within the one that is meant: ask again there
            for after, _ in node.next_functions:
                if after is not None:
                    after.register_prehook(self.ask)
        elif (task := torch._C._current_graph_task_id()) not in self.passes:
            self.passes.add(task)
            self.judge()

    def judge(self) -> None:
        """Name what had no gradient, but what may have one in a later pass, and let go of what is known."""
        root: Any = self.root()
        there: dict[str, Kind] = {} if root is None else {n: a for n, _, a in hosts(root) if self.adapter in a}
        parts = {name: id(adapters[self.adapter]) for name, adapters in there.items()}
        parts = {name: part for name, part in parts.items() if part in self.hooks}
        reached = [name for name, part in parts.items() if part in self.reached]
        silent = [name for name, part in parts.items() if part not in self.reached and self._trains(name, there[name])]
        waiting = [name for name in silent if len(self.passes) < PATIENCE and _stands_in(root, name, reached)]
        kept = [parts[name] for name in (waiting and [*waiting, reached[0]])]  # one that is reached counts the passes
        for part in self.hooks.keys() - set(kept):
            for hook in self.hooks.pop(part):
                hook.remove()
        self.queued.clear()
        if dead := [name for name in silent if name not in waiting]:
            self._name(dead, there)

    def _trains(self, name: str, adapters: Kind) -> bool:
        """Whether a part is asked for by name and should have had a gradient."""
        asked = adapters.by_targets or matches(adapters.records[self.adapter].config.train, name)
        return asked and any(parameter.requires_grad for parameter in adapters.trained(adapters[self.adapter]))

    def _name(self, dead: list[str], there: dict[str, Kind]) -> None:
        targets = ends((name for name in dead if there[name].by_targets), there)
        whole = [name for name in dead if not there[name].by_targets]
        found = [f"{end} ({count})" for end, count in targets.items()] + whole
        advice = [f"leave them out with exclude={list(targets)!r}"] if targets else []
        advice += [f"take {listed(whole)} out of train"] if whole else []
        passes = "the first backward pass" if len(self.passes) == 1 else f"{len(self.passes)} backward passes"
        warnings.warn(
            f"model: {len(dead)} of {len(there)} modules of adapter {self.adapter!r} had no gradient in {passes}: "
            f"{', '.join(found[:8])}{', ...' if len(found) > 8 else ''}. The loss does not depend on what the adapter "
            f"adds there (nobody calls them, or the batch had no input for them); {' and '.join(advice)}",
            LoraWarning,
            stacklevel=2,
        )


def _stands_in(root: nn.Module, name: str, reached: list[str]) -> bool:
    """Whether the module is inside a member of a list of which another member was reached, and this one not at all."""
    path = name.split(".")
    for i in range(1, len(path) - 1):
        around = ".".join(path[:i])
        members = {n.removeprefix(f"{around}.").split(".")[0] for n in reached if n.startswith(f"{around}.")}
        if isinstance(root.get_submodule(around), nn.ModuleList) and members and path[i] not in members:
            return True
    return False
