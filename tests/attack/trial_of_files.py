"""Load and inspect mutants in forked processes, and say what came of each.

A worker says what it begins and what came of it, so that a hang or a crash costs one mutant and is put down to it.
"""

import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora
from attacked_adapters import Original, effect, net, surroundings
from lora.files.description import describe
from lora.layers import hosts
from mutants_of_files import Mutant, directed, drawn, made

SECONDS, MEGABYTES, MESSAGE = 2.0, 100, 4096  # seconds of the processor's time, so that a busy machine is no fault
WAITING = 10  # times as many by the clock, for what waits and does nothing
HASHED = 200 << 20  # bytes a second: an inspection reads the whole file for its checksum
BATCH = 400
HANGS = (signal.SIGALRM, signal.SIGPROF)
Makers = list[Callable[[], Mutant]]
Todo = dict[int, tuple[str, ...]]
"""number of a mutant: what is still to be tried with it"""
# What no attack may bring about; the other outcomes are good.
FAULTS = ("foreign", "hang", "memory", "other values", "not finite", "long message", "touched")


def verdict_of_load(mutant: Mutant, model: nn.Module, folder: Path) -> tuple[str, str]:
    """(what came of it, more)"""
    before = surroundings(model)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lora.load(model, folder)
    except lora.LoraError as error:
        if surroundings(model) != before:
            return "touched", str(error)[:200]
        return ("long message", str(len(str(error)))) if len(str(error)) > MESSAGE else ("refused", "")
    told = any(issubclass(each.category, lora.LoraWarning) for each in caught)
    tensors = [p for _, _, adapters in hosts(model) for p in adapters.parameters()]
    finite = all(bool(torch.isfinite(p).all()) for p in tensors)
    same = effect(model) == mutant.like
    lora.remove(model)
    if surroundings(model)[:3] != before[:3]:
        return "touched", "after load and remove"
    if not finite:
        return "not finite", ""
    if same:
        return "same values", ""
    if mutant.kind == "sealed" and not told:
        return "other values", ""
    return ("told" if told else "other data" if mutant.data_changed else "other header or settings"), ""


def verdict_of_inspect(mutant: Mutant, folder: Path) -> tuple[str, str]:
    try:
        str(describe(folder)).encode()
    except lora.LoraError as error:
        return ("long message", str(len(str(error)))) if len(str(error)) > MESSAGE else ("refused", "")
    return "described", ""


def _peak() -> int:
    """The most address space that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmPeak:")[1].split()[0]) * 1024


def put(mutant: Mutant, folder: Path) -> int:
    """Lay a mutant's files into a folder, alone; returns the larger one's size."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, content in mutant.files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)
    return max((path.lstat().st_size for path in folder.iterdir()), default=0)


def _worker(todo: Todo, makers: Makers, folder: Path, pipe: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in HANGS:
        signal.signal(number, signal.SIG_DFL)  # ends the process wherever it is
    model, start = net(), _peak()
    # Against a machine without memory; what is counted is the peak.
    resource.setrlimit(resource.RLIMIT_AS, (start + (4 << 30), start + (4 << 30)))

    def say(*words: Any) -> None:
        os.write(pipe, (json.dumps(words) + "\n").encode())

    for number, verbs in todo.items():
        mutant = makers[number]()
        size = put(mutant, folder)
        for verb in verbs:
            say(number, verb)
            seconds = SECONDS + (size / HASHED if verb == "inspect" else 0)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            signal.setitimer(signal.ITIMER_REAL, WAITING * seconds)
            try:
                found = verdict_of_load(mutant, model, folder) if verb == "load" else verdict_of_inspect(mutant, folder)
            except BaseException as error:
                starved = isinstance(error, MemoryError) or "allocate memory" in str(error)
                found = "memory" if starved else "foreign", f"{type(error).__name__}: {str(error)[:150]}"
                model = net()
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            more = _peak() - start - size
            if more > MEGABYTES << 20:
                found = "memory", f"{more >> 20} MB; {found[0]} {found[1]}"
            say(number, verb, mutant.kind, mutant.what, *found)
            if found[0] in ("touched", "memory"):
                return  # the rest of the batch starts from a new process


@dataclass
class Running:
    """One worker and what it has said."""

    todo: Todo
    pid: int
    pipe: int
    folder: Path
    text: bytes = b""
    at: tuple[int, str] | None = None


@dataclass
class Findings:
    """counts: by (kind, verb, outcome). examples: of each fault, in words."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    examples: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, kind: str, verb: str, what: str, outcome: str, detail: str) -> None:
        self.counts[kind, verb, outcome] += 1
        if outcome in FAULTS:
            found = self.examples.setdefault(outcome, Counter())
            cause = detail.partition(":")[0] if outcome == "foreign" else detail[:40]
            found[f"{verb}, {kind}: {cause} <- {what}"] += 1

    def faults(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for (_, _, outcome), count in self.counts.items():
            found[outcome] += count
        return {fault: found[fault] for fault in FAULTS}


def cases_of(originals: list[Original], count: int, seed: int) -> Makers:
    """All directed mutants where they are at most half of `count`, else as many of them by chance; and random ones."""
    rng = random.Random(seed)
    known = directed(originals)
    chosen = known if len(known) <= count // 2 else rng.sample(known, count // 2)
    makers = [lambda case=case: made(case) for case in chosen]
    for number in range(count - len(chosen)):
        original = originals[number % len(originals)]
        makers.append(lambda number=number, original=original: drawn(random.Random(f"{seed}-{number}"), original))
    rng.shuffle(makers)
    return makers


def run(makers: Makers, place: Path, jobs: int, progress: bool = False) -> Findings:
    """Try all mutants in `jobs` processes at a time."""
    found, both = Findings(), ("load", "inspect")
    queue: list[Todo] = [
        dict.fromkeys(range(at, min(at + BATCH, len(makers))), both) for at in range(0, len(makers), BATCH)
    ]
    running: list[Running] = []
    free = [place / f"mutant-{n}" for n in range(jobs)]
    while queue or running:
        while queue and free:
            running.append(_start(queue.pop(), makers, free.pop()))
        ready, _, _ = select.select([worker.pipe for worker in running], [], [])
        for worker in [worker for worker in running if worker.pipe in ready]:
            part = os.read(worker.pipe, 1 << 16)
            *lines, worker.text = (worker.text + part).split(b"\n")
            for line in lines:
                _take(worker, json.loads(line), found)
            if not part:
                running.remove(worker)
                free.append(worker.folder)
                _ended(worker, makers, found)
                if worker.todo:
                    queue.append(worker.todo)
                elif progress:
                    print(f"{sum(map(len, queue)):,} mutants wait", file=sys.stderr)
    return found


def _start(todo: Todo, makers: Makers, folder: Path) -> Running:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            _worker(todo, makers, folder, write)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    return Running(todo, pid, read, folder)


def _tried(worker: Running, number: int, verb: str) -> None:
    worker.at = None
    worker.todo[number] = tuple(each for each in worker.todo[number] if each != verb)
    if not worker.todo[number]:
        del worker.todo[number]


def _take(worker: Running, words: list, found: Findings) -> None:
    number, verb, *result = words
    worker.at = number, verb
    if result:
        _tried(worker, number, verb)
        found.add(result[0], verb, *result[1:])


def _ended(worker: Running, makers: Makers, found: Findings) -> None:
    """Put a worker's end down to what it was at."""
    os.close(worker.pipe)
    _, status = os.waitpid(worker.pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the attack itself failed; see above")
    if worker.at is None:
        return
    number, verb = worker.at
    mutant = makers[number]()
    signaled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    ended = signal.Signals(signaled).name if signaled else "exit"
    _tried(worker, number, verb)
    found.add(mutant.kind, verb, mutant.what, "hang" if signaled in HANGS else "foreign", f"{ended}: ended by it")
