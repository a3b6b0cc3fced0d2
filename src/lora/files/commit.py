"""Files that are written whole or not at all, one writer at a time in a folder."""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import LoraError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)  # of folders, on some filesystems


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is synced to disk and renamed over `path`, else deleted."""
    path = Path(os.path.realpath(path))
    with locked(path.parent) as alone:
        if alone:
            sweep(path, "tmp")
        with replaced_together(path) as (temporary,):
            yield temporary


@contextmanager
def replaced_together(*paths: Path) -> Iterator[list[Path]]:
    """`replaced` for several files: the rename of the first is the commit, and the others follow it.

    Where one cannot follow, the error says so; a reader can tell by what the first one holds. No hard links are made.
    """
    temporary = [path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in paths]
    made = False
    try:
        for new in temporary:
            new.open("xb").close()
        made = True
        yield temporary
        for new in temporary:
            sync(new)
        for new, path in zip(temporary, paths, strict=True):  # with nothing in between: others read both files
            os.replace(new, path)
        for path in paths:
            sync_folder(path.parent)
    except BaseException as error:
        if not made or temporary[0].exists():
            raise
        for new, path in zip(temporary[1:], paths[1:], strict=True):  # interrupted after the commit: finish
            with suppress(OSError):
                os.replace(new, path)
        left = [str(path) for new, path in zip(temporary, paths, strict=True) if new.exists()]
        if isinstance(error, OSError):
            what = f"but not {', '.join(left)}" if left else "but its filesystem may not have kept it"
            raise LoraError(f"{paths[0]}: is written, {what} ({error.strerror or error}); save again") from error
        raise
    finally:
        for new in temporary:
            with suppress(OSError):
                new.unlink(missing_ok=True)


@contextmanager
def told(what: str) -> Iterator[None]:
    """An error of the operating system as ours: what could not be done, and why."""
    try:
        yield
    except OSError as error:
        raise LoraError(f"{what} ({error.strerror or error})") from error


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Keep other writers out of a folder. False: its filesystem or the system has no locks, and nobody is kept out.

    Raises:
        BlockingIOError: another writer is there and `wait` is not set.
    """
    handle, held = None, False
    if fcntl is not None:
        with suppress(OSError):  # a folder that may be written and not read
            handle = os.open(folder, os.O_RDONLY)
    try:
        if handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                raise
            except OSError:
                pass
        yield held
    finally:
        if handle is not None:
            if held:  # closing is not enough: a process that was forked meanwhile has a copy of the handle
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def sweep(path: Path, suffix: str) -> None:
    """Delete what writers of `path` that were killed have left beside it; only for who has locked the folder."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.{suffix}")
    for name in filter(ours.fullmatch, os.listdir(path.parent)):
        with suppress(OSError):
            path.with_name(name).unlink()


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    try:
        sync(path)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
