"""What trains nothing is named, once, after the first backward pass of an adapter.

Nothing is added to the forward pass. A few parameters have a hook, up to the end of the first backward pass, which then
looks at who has a gradient. (A hook that was removed costs its parameter 0.3 us a step for good, so not all have one.)
"""

import warnings
import weakref
from typing import Any

import torch
from torch import nn

from ..config import matches
from ..errors import LoraWarning, ends, listed
from .host import base_modules, submodule
from .kind import Kind, Part, hosts

PATIENCE = 8
"""The backward passes in which an expert may have no token, or a layer be dropped at random, before it is named."""


class Watch:
    """Which parts of an adapter have had a gradient. The hooks hold it, so that a copy of the model has none."""

    def __init__(self, root: nn.Module, adapter: str, parts: list[Part]) -> None:
        self.root, self.adapter = weakref.ref(root), adapter  # nothing here holds a parameter
        self.silent = {id(part) for _, _, part in parts}
        self.reached: set[str] = set()
        self.passes: set[int] = set()  # ids of those that have ended
        self.queued: set[int] = set()
        names = {module: name for name, module in base_modules(root)}
        first: dict[str, list[Any]] = {}  # by the last part of the host's name
        for host, kind, part in parts:
            trained = [parameter for parameter in kind.trained(part) if parameter.requires_grad]
            first.setdefault(names[host].rpartition(".")[2], trained)
        self.hooks = [p.register_post_accumulate_grad_hook(self.ask) for trained in first.values() for p in trained]

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
        """Name what has had no gradient, but what may have one in a later pass; at the end let go."""
        root: Any = self.root()
        there: dict[str, Kind] = {} if root is None else {n: a for n, _, a in hosts(root) if self.adapter in a}
        silent = {name: id(adapters[self.adapter]) for name, adapters in there.items()}
        silent = {name: part for name, part in silent.items() if part in self.silent}
        for name in silent:
            if any(parameter.grad is not None for parameter in there[name].trained(there[name][self.adapter])):
                self.reached.add(name)
        silent = {name: part for name, part in silent.items() if name not in self.reached}
        last = len(self.passes) >= PATIENCE
        dead = [name for name in silent if last or not _stands_in(root, name, self.reached)]
        if not self.reached:
            dead = []  # somebody takes the gradients away at once
        self.silent = set() if last else {silent[name] for name in silent if name not in dead}
        if not self.silent:
            for hook in self.hooks:
                hook.remove()
        if dead := [name for name in dead if self._trains(name, there[name])]:
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
            f"adds there (nobody calls them, or the batch had no input for them). Unless another loss or batch reaches "
            f"them, {' and '.join(advice)}",
            LoraWarning,
            stacklevel=2,
        )


def _stands_in(root: nn.Module, name: str, reached: set[str]) -> bool:
    """Whether the module is inside a member of a list of which another member was reached, and this one not at all."""
    path = name.split(".")
    for i in range(1, len(path) - 1):
        around = ".".join(path[:i])
        members = {n.removeprefix(f"{around}.").split(".")[0] for n in reached if n.startswith(f"{around}.")}
        if isinstance(submodule(root, around), nn.ModuleList) and members and path[i] not in members:
            return True
    return False
