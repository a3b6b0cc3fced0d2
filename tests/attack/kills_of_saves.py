"""End a save by SIGKILL: before each call, at each size of a file, at random times, and twice in a row."""

import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lora
from calls_of_saves import before_call
from saves_under_attack import adapted, forked, fresh, killed, leftovers, read_by_peft, read_by_us, started, template

NOBODY = 65534  # the user without rights, where we are the one who has all
STARTS = {"over ours": "us", "over PEFT's": "peft", "the first save": "nobody"}


@dataclass
class Kills:
    """What stood there after `kills` kills: outcomes by reader, names left over after them and after the next save."""

    kills: int = 0
    ours: Counter[str] = field(default_factory=Counter)
    peft: Counter[str] = field(default_factory=Counter)
    peft_after_load: Counter[str] = field(default_factory=Counter)
    read_only: Counter[str] = field(default_factory=Counter)
    left_by_kills: int = 0
    left_after_next_save: int = 0
    next_save_wrong: int = 0
    examples: Counter[str] = field(default_factory=Counter)

    def check(self, folder: Path, allowed: dict[str, str], what: str) -> str:
        """Read a folder that a killed save left, save again, and read that. Returns the state that we found.

        allowed: the states that may stand there, and what each is called; "none" is no adapter.
        """
        self.kills += 1
        copy = folder.with_name(f"{folder.name}-copy")
        shutil.rmtree(copy, ignore_errors=True)
        if folder.exists():
            shutil.copytree(folder, copy, symlinks=True)
        self.left_by_kills += len(leftovers(folder))
        # To PEFT a folder without an adapter is an error like any other.
        by_peft = {**allowed, "refused": "none"} if "none" in allowed else allowed
        self.peft[_called(read_by_peft(copy), by_peft)] += 1
        self.read_only[_called(forked(lambda: _without_rights(copy))[1], allowed)] += 1
        if copy.exists():
            copy.chmod(0o755)
        found = read_by_us(copy)
        self.ours[_called(found, allowed)] += 1
        self.peft_after_load[_called(read_by_peft(copy), by_peft)] += 1
        if _called(found, allowed) not in allowed.values():
            self.examples[f"{what}: {found[:150]}"] += 1
        lora.save(adapted(4), folder)
        self.left_after_next_save += len(leftovers(folder))
        self.next_save_wrong += read_by_us(folder) != "4"
        return found

    def faults(self) -> dict[str, int]:
        torn = [
            sum(count for name, count in reader.items() if name not in ("old", "new", "none"))
            for reader in (self.ours, self.read_only)
        ]
        return {
            "neither old nor new": torn[0], "the same where nothing may be written": torn[1],
            "left over after the next save": self.left_after_next_save,
            "the next save did not help": self.next_save_wrong,
        }  # fmt: skip


def _without_rights(folder: Path) -> str:
    """What we read where a load can repair nothing."""
    if folder.exists():
        folder.chmod(0o555)
        for path in folder.iterdir():
            path.chmod(0o444)
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    return read_by_us(folder)


def _called(found: str, allowed: dict[str, str]) -> str:
    kind = "none" if "does not exist" in found or "has no adapter_" in found else found.partition(":")[0]
    return allowed.get(kind, kind)


def _end(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _save_and_die(folder: Path, state: int, number: int) -> tuple[bool, Any]:
    """Save and be killed before the n-th call: (whether it was, how many calls there were otherwise)."""
    model = adapted(state)

    def work() -> int:
        calls = before_call(number, folder, _end)
        lora.save(model, folder)
        return calls()

    status, calls = forked(work)
    return killed(status), calls


def at_every_call(place: Path, start: str) -> Kills:
    """One kill before each call to the filesystem, from one start."""
    found, source = Kills(), template(place, 1, STARTS[start])
    allowed = {"1": "old", "2": "new"} if source.exists() else {"none": "none", "2": "new"}
    number, folder = 1, place / "killed"
    while True:
        was_killed, _ = _save_and_die(fresh(source, folder), 2, number)
        if not was_killed:
            return found
        found.check(folder, allowed, f"{start}, before call {number}")
        number += 1


def twice(place: Path, step: int = 1) -> Kills:
    """A killed save over what another killed save left: all pairs of calls, or each `step`-th."""
    found, source = Kills(), template(place, 1)
    folder, after = place / "killed", place / "after-one"
    first = 1
    while True:
        was_killed, _ = _save_and_die(fresh(source, after), 2, first)
        if not was_killed:
            return found
        before = read_by_us(fresh(after, folder))
        number = 1 + first % step
        while _save_and_die(fresh(after, folder), 3, number)[0]:
            found.check(folder, {before: "old", "3": "new"}, f"before call {first}, then before call {number}")
            number += step
        first += step


def at_every_size(place: Path, step: int) -> Kills:
    """The kernel ends the process at the write that would make a file larger than n bytes."""
    found, source, model = Kills(), template(place, 1), adapted(2)
    folder, limit = place / "killed", 0

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        lora.save(model, folder)

    while True:
        fresh(source, folder)
        status, _ = forked(work)
        if not killed(status):
            return found
        found.check(folder, {"1": "old", "2": "new"}, f"at {limit} bytes")
        limit += step


def at_random_times(place: Path, kills: int, seed: int) -> Kills:
    """Kills between the begin and the end of a save, by the clock."""
    found, source, model, rng = Kills(), template(place, 1), adapted(2), random.Random(seed)
    folder = place / "killed"

    def work() -> None:
        started()
        lora.save(model, folder)

    def took(pid: int, pipe: int) -> None:
        os.read(pipe, 1)
        begin = time.monotonic()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        times.append(time.monotonic() - begin)

    def kill(pid: int, pipe: int) -> None:
        os.read(pipe, 1)
        time.sleep(rng.uniform(0, sorted(times)[len(times) // 2]))
        os.kill(pid, signal.SIGKILL)

    times: list[float] = []
    for _ in range(7):
        fresh(source, folder)
        forked(work, took)
    attempts = 0
    while found.kills < kills and attempts < 3 * kills:
        attempts += 1
        fresh(source, folder)
        status, _ = forked(work, kill)
        if killed(status):
            found.check(folder, {"1": "old", "2": "new"}, "by the clock")
    return found


def kills(place: Path, count: int, size: int, pairs: int, seed: int) -> dict[str, Kills]:
    """All of it: at every call, every `size` bytes, each `pairs`-th pair of calls, and `count` by the clock."""
    runs: dict[str, Callable[[], Kills]] = {
        f"before each call, {start}": lambda start=start: at_every_call(place, start) for start in STARTS
    }
    runs["before each call, twice in a row"] = lambda: twice(place, pairs)
    runs["at each size of a file"] = lambda: at_every_size(place, size)
    runs["by the clock"] = lambda: at_random_times(place, count, seed)
    return {name: run() for name, run in runs.items()}
