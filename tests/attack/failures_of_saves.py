"""Saves that cannot: full disks at every size, a call that fails, places that cannot be written, odd folders."""

import ctypes
import errno
import os
import resource
import shutil
import signal
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lora
from attacked_adapters import TENSORS
from calls_of_saves import before_call
from saves_under_attack import adapted, base, forked, fresh, leftovers, outcome, read_by_us, template

NEWNS, NEWUSER, READ_ONLY, REMOUNT, PRIVATE = 0x20000, 0x10000000, 1, 32, 1 << 18
NOBODY, PAGE = 65534, 4096


@dataclass
class Failures:
    """Saves by outcome and by what the folder then holds; `left`: names beside the two files after the call itself.

    late: whether an error may come when the new adapter stands there already, whole: a call after the commit failed.
    """

    late: bool = False
    tried: int = 0
    saves: Counter[str] = field(default_factory=Counter)
    left: int = 0
    left_after_next_save: int = 0
    examples: Counter[str] = field(default_factory=Counter)

    def add(self, what: str, said: str, holds: str, left: int) -> None:
        """holds: the state that is read afterwards; "1" is the old one, "2" the one that was saved."""
        said_kind, held = said.partition(":")[0], {"1": "old", "2": "new"}.get(holds, "torn")
        right = (said_kind, held) in (("saved", "new"), ("refused", "old"))
        self.tried += 1
        self.saves[said_kind if right else f"{said_kind}, {held}"] += 1
        self.left += left
        if not right or left:
            self.examples[f"{what}: {said[:160]}; then {holds[:60]}, {left} left over"] += 1

    def faults(self) -> dict[str, int]:
        total = {kind: sum(n for name, n in self.saves.items() if kind in name) for kind in ("foreign", "torn")}
        wrong = self.saves["saved, old"] + (0 if self.late else self.saves["refused, new"])
        return {**total, "said otherwise": wrong, "left over": self.left, "left over later": self.left_after_next_save}


def _in(folder: Path, what: str, found: Failures, said: str) -> None:
    found.add(what, said, read_by_us(folder), len(leftovers(folder)))
    lora.save(adapted(3), folder)
    found.left_after_next_save += len(leftovers(folder))


def file_limit(place: Path, step: int) -> Failures:
    """No file may grow beyond n bytes (EFBIG), for n up to the adapter's size."""
    found, source, model = Failures(), template(place, 1), adapted(2)
    folder = place / "full"

    def work(limit: int) -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return outcome(lambda: lora.save(model, folder))

    for limit in range(0, (source / TENSORS).stat().st_size + step, step):
        fresh(source, folder)
        _, said = forked(lambda limit=limit: work(limit))
        _in(folder, f"files up to {limit} bytes", found, said)
    return found


def failing_call(place: Path, number: int) -> Failures:
    """The n-th call to the filesystem fails with this errno, for every n."""
    found, source, model = Failures(late=True), template(place, 1), adapted(2)
    folder, events = place / "failing", ["..."]

    def work(at: int) -> list[str]:
        event: list[str] = []

        def fail(name: str) -> None:
            event.append(name)
            raise OSError(number, os.strerror(number))

        before_call(at, folder, fail)
        return [outcome(lambda: lora.save(model, folder)), *event]

    at = 1
    while events:
        fresh(source, folder)
        _, (said, *events) = forked(lambda at=at: work(at))
        if events:
            # Where taking away a file fails, it stays until the next save.
            left = 0 if events[0] == "os.remove" else len(leftovers(folder))
            found.add(f"call {at}, {events[0]}", said, read_by_us(folder), left)
        lora.save(adapted(3), folder)
        found.left_after_next_save += len(leftovers(folder))
        at += 1
    return found


# Filesystems of our own, in a namespace of one process: nothing outside sees them.


def _mount(kind: bytes, target: Path, flags: int, options: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(kind, os.fsencode(target), kind, ctypes.c_ulong(flags), options):
        raise OSError(ctypes.get_errno(), "mount")


def _own_mounts() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEWNS if os.geteuid() == 0 else NEWNS | NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare")
    _mount(b"none", Path("/"), PRIVATE | 16384, b"")


def full_disk(place: Path) -> Failures | None:
    """A tmpfs of 1 MB with n pages free, for n up to more than both files take; None where none can be mounted."""
    found, source, model = Failures(), template(place, 1), adapted(2)
    disk = place / "disk"
    disk.mkdir(exist_ok=True)

    def work() -> list[list[Any]] | None:
        try:
            _own_mounts()
            _mount(b"tmpfs", disk, 0, b"size=1m")
        except OSError:
            return None
        tried: list[list[Any]] = []
        for pages in range(0, 3 * (source / TENSORS).stat().st_size // PAGE + 8):
            folder = fresh(source, disk / "adapter")
            free = os.statvfs(disk).f_bavail * PAGE
            (disk / "filler").write_bytes(bytes(max(0, free - pages * PAGE)))
            said = outcome(lambda folder=folder: lora.save(model, folder))
            tried.append([f"{pages} pages free", said, read_by_us(folder), len(leftovers(folder))])
            (disk / "filler").unlink()
            lora.save(adapted(3), folder)
            tried[-1].append(len(leftovers(folder)))
        return tried

    _, tried = forked(work)
    for *each, later in tried or []:
        found.add(*each)
        found.left_after_next_save += later
    return None if tried is None else found


def _read_only_disk(folder: Path, save: Callable[[], None]) -> str:
    try:
        _own_mounts()
        source = fresh(folder, folder.with_name("source"))
        _mount(b"tmpfs", folder, 0, b"size=1m")
        shutil.copytree(source, folder, dirs_exist_ok=True)
        _mount(b"tmpfs", folder, READ_ONLY | REMOUNT, b"")
    except OSError:
        return "refused: no namespace here"
    said = outcome(save)
    return said if read_by_us(folder) == "1" else f"torn: {said}"


def _no_rights(folder: Path, save: Callable[[], None]) -> str:
    folder.chmod(0o555)
    if os.geteuid() == 0:  # who may do anything
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    return outcome(save)


def _without(module: str, name: str, number: int) -> Callable[[Path, Callable[[], None]], str]:
    """The filesystem has no such call."""

    def run(folder: Path, save: Callable[[], None]) -> str:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        setattr(__import__(module), name, fail)
        return outcome(save)

    return run


def _file_as_parent(folder: Path, save: Callable[[], None]) -> str:
    shutil.rmtree(folder)
    folder.write_text("a file")
    said = outcome(save)
    folder.unlink()
    fresh(folder.with_name("template-1-us"), folder)
    return said


# How a save ends there: with the old adapter in place and a LoraError, or saved.
PLACES: dict[str, tuple[str, Callable[[Path, Callable[[], None]], str]]] = {
    "a read-only filesystem": ("refused", _read_only_disk),
    "a folder without the right to write": ("refused", _no_rights),
    "a file in the folder's place": ("refused", _file_as_parent),
    "no hard links": ("saved", _without("os", "link", errno.EPERM)),
    "no locks": ("saved", _without("fcntl", "flock", errno.ENOLCK)),
    "no locks at all": ("saved", _without("fcntl", "flock", errno.EOPNOTSUPP)),
}  # fmt: skip


def in_place(place: Path, name: str) -> Failures:
    """One save in one of PLACES; what should have been saved and was not counts as said otherwise."""
    found, source, model = Failures(), template(place, 1), adapted(2)
    place.chmod(0o755)
    folder = fresh(source, place / "odd")
    expected, run = PLACES[name]
    _, said = forked(lambda: run(folder, lambda: lora.save(model, folder)))
    folder.chmod(0o755)
    if said.startswith("refused") and expected == "saved":
        said = said.replace("refused", "refused though it can be saved", 1)
    _in(folder, name, found, said)
    return found


# Odd folders: what is there beside the adapter or by way of links stays what it is.


def odd_folders(place: Path) -> dict[str, str]:
    """ "as it should be", or what is not, of a save into each folder."""
    source, found = template(place, 1), {}

    def told(name: str, folder: Path, more: Callable[[], bool]) -> None:
        said = outcome(lambda: lora.save(adapted(2), folder))
        holds = read_by_us(folder)
        good = said == "saved" and holds == "2" and more()
        found[name] = "as it should be" if good else f"{said}; {holds}; {sorted(p.name for p in folder.iterdir())}"

    folder = fresh(source, place / "linked-to")
    link = place / "a-link"
    link.symlink_to(folder.name)
    told("the folder is a link", link, lambda: link.is_symlink() and read_by_us(folder) == "2")

    folder = fresh(source, place / "with-others")
    others = {"notes.txt": b"mine", ".hidden": b"mine", ".adapter_model.safetensors.swp": b"mine", "x.tmp": b"mine"}
    for name, content in others.items():
        (folder / name).write_bytes(content)
    told("other people's files", folder, lambda: all((folder / n).read_bytes() == c for n, c in others.items()))

    folder, elsewhere = fresh(source, place / "linked-file"), place / "elsewhere"
    elsewhere.mkdir()
    (folder / TENSORS).rename(elsewhere / TENSORS)
    (folder / TENSORS).symlink_to(elsewhere / TENSORS)
    told("the tensor file is a link", folder, lambda: leftovers(folder) == [])

    folder = fresh(source, place / "unreadable")
    for path in folder.iterdir():
        path.chmod(0)
    _, said = forked(lambda: _no_rights(folder, lambda: lora.load(base(), folder)))
    found["a load of files that may not be read"] = "as it should be" if said.startswith("refused") else said

    folder = fresh(source, place / "read-only-files")
    for path in folder.iterdir():
        path.chmod(stat.S_IRUSR)
    told("the files are read-only", folder, lambda: leftovers(folder) == [])
    return found
