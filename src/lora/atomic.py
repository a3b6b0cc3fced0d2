"""A verb happens whole or not at all, and alone: what fails or is interrupted half-way is taken back.

Before its first write a verb notes all that verbs may change: references, no tensor is copied. Weights that are written
in place have a journal beside it. Verbs of all threads run one after the other, and never while a thread is within
`steady`.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .bases import touched
from .errors import LoraError
from .exact import Journal
from .layers.host import adapters_of, outside_adapters

ResultT = TypeVar("ResultT")
_TABLES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))  # parameters, hooks, ...
_EMPTY: dict[str, Any] = {}
_PAUSE = 0.001  # seconds between two looks at who has the turn
_verb: dict[str, tuple[int, object]] = {}  # "now": the thread whose verb runs, and its outermost turn
_forwards: dict[object, int] = {}  # turns within `steady`, and their threads
_waiting: dict[object, int] = {}  # those that wait for a verb


def steady() -> AbstractContextManager[None]:
    """Within the block no verb runs in another thread: forward passes in it read one set of adapters, whole.

    Any number of threads may be within it at once. A verb of another thread waits until all have left; who comes after
    it waits for the verb, and goes before the next one. It is for all models of the process.

    Raises:
        LoraError: from a verb that is called within the block by the same thread, which would wait for itself. `save`
            of a model that is not merged may be called.
    """
    return _turn(alone=False)


def alone() -> AbstractContextManager[None]:
    """For a verb: within the block no other thread's verb runs, and none is within `steady`."""
    return _turn(alone=True)


def whole_or_not(
    root: nn.Module, change: Callable[[Journal], ResultT], beside: Iterable[nn.Module] = ()
) -> ResultT:  # fmt: skip
    """Call what changes the model, alone; where it fails or is interrupted, take all back and raise.

    It is given the journal, for tensors that are written in place. It is a function and not a block, whose end Python
    may leave out when a second interrupt comes just there. `beside`: what it changes of adapters that do not act.
    """
    with alone():
        before, journal = _Before([*_changeable(root), *beside], touched(root)), Journal()
        try:
            try:
                return change(journal)
            except BaseException:
                before.back(journal)
                raise
        except BaseException:
            before.back(journal)  # again, where that was interrupted; else there is nothing to do
            raise


@contextmanager
def later_interrupts() -> Iterator[None]:
    """A Ctrl-C within the block comes at its end. In other threads than the main one there is none."""
    handler, came = signal.getsignal(signal.SIGINT), []
    waits = callable(handler) and threading.current_thread() is threading.main_thread()
    try:
        if waits:
            signal.signal(signal.SIGINT, lambda *args: came.append(args))
        yield
    finally:
        if waits:
            signal.signal(signal.SIGINT, handler)
        if came and callable(handler):  # also where the block ends in an error, which is then its context
            handler(*came[-1])


def _changeable(root: nn.Module) -> Iterator[nn.Module]:
    """What a verb may write to: not the parts of adapters that do not act, of which there may be many."""
    for module in outside_adapters(root):
        yield module
        if (adapters := adapters_of(module)) is not None:
            yield adapters
            for term in adapters.terms:
                yield from term.modules()


class _Before:
    """What a model was, by reference: classes, attributes, children, parameters, hooks; the memory of tensors and
    whether they train; what others keep on the model; the random numbers.

    Few objects are made for it: many would have Python look for garbage, which takes longer than a verb.
    """

    def __init__(self, changed: list[nn.Module], others: list[Any]) -> None:
        modules = list(dict.fromkeys(changed))
        self.things: list[Any] = [*modules, *others]
        self.kinds = [*map(type, self.things)]
        self.tables = [thing.__dict__ for thing in self.things]
        self.tables += [t for m in modules for name in _TABLES if (t := vars(m).get(name)) is not None]
        self.contents = [table.copy() if table else _EMPTY for table in self.tables]
        self.tensors = [
            t for m in modules for table in (m._parameters, m._buffers) for t in table.values() if t is not None
        ]
        self.trains = [t.requires_grad for t in self.tensors]
        self.memory = [None if hasattr(t, "full_tensor") or is_lazy(t) else t.data for t in self.tensors]
        self.random = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def back(self, journal: Journal) -> None:
        """Put it back. May be called again, after an interrupt in it too."""
        with later_interrupts():
            journal.back()
            for thing, kind in zip(self.things, self.kinds, strict=True):
                if type(thing) is not kind:
                    object.__setattr__(thing, "__class__", kind)
            for table, contents in zip(self.tables, self.contents, strict=True):
                if [*map(id, table.values())] != [*map(id, contents.values())] or [*table] != [*contents]:
                    table.clear()
                    table.update(contents)
            for tensor, trains, data in zip(self.tensors, self.trains, self.memory, strict=True):
                if tensor.requires_grad != trains:
                    tensor.requires_grad_(trains)
                if data is not None and (tensor.dtype != data.dtype or tensor.data_ptr() != data.data_ptr()):
                    tensor.data = data
            torch.set_rng_state(self.random)
            if self.cuda:
                torch.cuda.set_rng_state_all(self.cuda)


@contextmanager
def _turn(alone: bool) -> Iterator[None]:
    """Each step of taking and giving a turn is one operation on a dict, so that an interrupt leaves no lock half taken.
    That is why who waits looks again and again."""
    mine = object()
    try:
        try:
            (_take_alone if alone else _take)(mine, threading.get_ident())
            yield
        finally:
            _give(mine)
    except BaseException:
        _give(mine)  # again, where that was interrupted
        raise


def _take(mine: object, me: int) -> None:
    within = me in _forwards.copy().values()
    while True:
        _forwards[mine] = me
        if within or _verb.get("now", (me, mine))[0] == me:
            _waiting.pop(mine, None)
            return
        _waiting[mine] = _forwards.pop(mine)
        time.sleep(_PAUSE)


def _take_alone(mine: object, me: int) -> None:
    if _verb.get("now", (0, mine))[0] == me:
        return  # a verb within a verb
    if me in _forwards.copy().values():
        raise LoraError("model: this thread is within lora.steady(), and a verb would wait for it; leave that first")
    first = _waiting.copy()  # a thread of many verbs keeps nobody out
    while first.keys() & _waiting.copy().keys():
        time.sleep(_PAUSE)
    while _verb.setdefault("now", (me, mine))[1] is not mine:
        time.sleep(_PAUSE)
    while _forwards:
        time.sleep(_PAUSE)


def _give(mine: object) -> None:
    _forwards.pop(mine, None)
    _waiting.pop(mine, None)
    if _verb.get("now", (0, None))[1] is mine:
        del _verb["now"]


def _nobody() -> None:
    """In a forked process: the threads that have turns are not there, and would be waited for."""
    for turns in (_verb, _forwards, _waiting):
        turns.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_nobody)
