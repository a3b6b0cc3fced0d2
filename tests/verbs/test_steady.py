"""Verbs of several threads, and the forward passes that no verb may come between."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora
from conftest import randomize
from lora import atomic
from lora.layers import hosts

HANG = 60  # seconds after which a thread is taken to hang


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    for name in ("a", "b"):
        randomize(lora.inject(model, r=2, targets=["0", "1"], name=name))
    return model


class Other(threading.Thread):
    """A call in another thread. error: what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.call, self.error = call, None
        self.start()

    def run(self) -> None:
        try:
            self.call()
        except BaseException as error:
            self.error = error

    def done(self) -> bool:
        self.join(HANG)
        return not self.is_alive() and self.error is None


class Held:
    """A thread that is within a block until it is told to leave."""

    def __init__(self, block: Callable[[], Any]) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()

        def call() -> None:
            with block():
                self.inside.set()
                assert self.leave.wait(HANG)

        self.thread = Other(call)

    def came(self) -> bool:
        return self.inside.wait(HANG)

    def end(self) -> None:
        self.leave.set()
        assert self.thread.done()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it to wait until so many threads wait for their turn."""
    waiting: set[int] = set()
    changed = threading.Condition()

    def sleep(seconds: float) -> None:
        with changed:
            waiting.add(threading.get_ident())
            changed.notify_all()
        threading.Event().wait(seconds)

    monkeypatch.setattr(atomic.time, "sleep", sleep)

    def until(number: int) -> None:
        with changed:
            assert changed.wait_for(lambda: len(waiting) >= number, HANG)

    return until


def acting(model: nn.Module) -> set[tuple[str, ...]]:
    return {adapters.active for _, _, adapters in hosts(model)}


def nobody_has_a_turn() -> bool:
    return not atomic._verb and not atomic._forwards and not atomic._waiting


def test_many_threads_are_steady_at_once_and_a_verb_waits_for_all(waits: Callable[[int], None]) -> None:
    model = net()
    readers = [Held(lora.steady), Held(lora.steady)]
    assert all(reader.came() for reader in readers)
    verb = Other(lambda: lora.activate(model, "a"))
    waits(1)
    readers[0].end()
    assert verb.is_alive() and acting(model) == {("b",)}
    readers[1].end()
    assert verb.done() and acting(model) == {("a",)}
    assert nobody_has_a_turn()


def test_who_comes_after_a_waiting_verb_waits_for_it_so_that_it_has_its_turn(waits: Callable[[int], None]) -> None:
    model = net()
    first = Held(lora.steady)
    assert first.came()
    verb = Other(lambda: lora.activate(model, "a"))
    waits(1)
    seen: list[set[tuple[str, ...]]] = []

    def late() -> None:
        with lora.steady():
            seen.append(acting(model))

    second = Other(late)
    waits(2)
    assert not seen
    first.end()
    assert verb.done() and second.done()
    assert seen == [{("a",)}]


def test_who_waits_for_a_verb_goes_before_the_next_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    sleepers: list[int] = []
    asleep, wake, looked = threading.Event(), threading.Event(), threading.Semaphore(0)

    def sleep(seconds: float) -> None:
        me = threading.get_ident()
        sleepers.append(me)
        if me == sleepers[0]:  # the forward pass sleeps for long
            asleep.set()
            assert wake.wait(HANG)
        else:
            looked.release()
            threading.Event().wait(seconds)

    model = net()
    first = Held(atomic.alone)
    assert first.came()
    monkeypatch.setattr(atomic.time, "sleep", sleep)
    reader = Held(lora.steady)
    assert asleep.wait(HANG)
    second = Other(lambda: lora.activate(model, "a"))
    assert looked.acquire(timeout=HANG)
    first.end()
    while looked.acquire(blocking=False):
        pass
    assert all(looked.acquire(timeout=10) for _ in range(3)), "the verb did not wait"
    wake.set()
    assert reader.came()
    assert second.is_alive() and acting(model) == {("b",)}
    reader.end()
    assert second.done() and acting(model) == {("a",)}


def test_steady_within_steady_does_not_wait_for_a_waiting_verb(waits: Callable[[int], None]) -> None:
    model = net()
    verb = None
    with lora.steady():
        verb = Other(lambda: lora.activate(model, "a"))
        waits(1)
        with lora.steady():
            assert acting(model) == {("b",)}
        assert acting(model) == {("b",)}
    assert verb.done() and acting(model) == {("a",)}


@pytest.mark.parametrize("verb", ["activate", "merge", "remove", "inject", "disabled", "save of a merged model"])
def test_a_verb_within_steady_of_the_same_thread_is_refused_in_words(verb: str, tmp_path: Path) -> None:
    model = net()
    if verb.startswith("save"):
        lora.merge(model)
    verbs: dict[str, Callable[[], object]] = {
        "activate": lambda: lora.activate(model, "a"),
        "merge": lambda: lora.merge(model),
        "remove": lambda: lora.remove(model, "a"),
        "inject": lambda: lora.inject(model, r=2, targets=["0"], name="c"),
        "disabled": lambda: lora.disabled(model).__enter__(),
        "save of a merged model": lambda: lora.save(model, tmp_path),
    }
    before = acting(model)
    with lora.steady(), pytest.raises(lora.LoraError, match=r"within lora.steady\(\)"):
        verbs[verb]()
    assert acting(model) == before
    assert nobody_has_a_turn()


def test_a_save_within_steady_goes_on(tmp_path: Path) -> None:
    model = net()
    with lora.steady():
        lora.save(model, tmp_path, "a")
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_verb_waits_for_the_verb_of_another_thread(waits: Callable[[int], None]) -> None:
    model = net()
    first = Held(atomic.alone)
    assert first.came()
    second = Other(lambda: lora.activate(model, "a"))
    waits(1)
    assert acting(model) == {("b",)}
    first.end()
    assert second.done() and acting(model) == {("a",)}


def test_the_block_of_disabled_keeps_no_other_thread_waiting() -> None:
    model = net()

    @contextmanager
    def block() -> Iterator[None]:
        with lora.disabled(model):
            yield

    held = Held(block)
    assert held.came()
    with lora.steady():
        assert acting(model) == {()}
    held.end()
    assert acting(model) == {("b",)}


def test_an_exception_within_steady_ends_it() -> None:
    with pytest.raises(ValueError, match="mine"), lora.steady():
        raise ValueError("mine")
    assert nobody_has_a_turn()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("block", [lora.steady, atomic.alone])
def test_a_forked_process_waits_for_no_thread_of_its_parent(block: Callable[[], Any]) -> None:
    model, held = net(), Held(block)
    assert held.came()
    child = os.fork()
    if child == 0:
        signal.alarm(HANG)  # the end of one that hangs
        try:
            lora.activate(model, "a")
        finally:
            os._exit(acting(model) != {("a",)})
    assert os.waitpid(child, 0)[1] == 0
    held.end()
    assert nobody_has_a_turn()
