"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is synced to disk and renamed over `path`, else deleted."""
    with replaced_together(path) as (temporary,):
        yield temporary


@contextmanager
def replaced_together(*paths: Path) -> Iterator[list[Path]]:
    """`replaced` for files of one folder that belong together: when one cannot be put in place, the old ones stay."""
    temporary = [_beside(path, ".tmp") for path in paths]
    kept = [_beside(path, ".old") for path in paths]
    try:
        yield temporary
        for new in temporary:
            new.chmod(0o666 & ~_umask())
            sync(new)
        for path, old in zip(paths, kept, strict=True):
            old.unlink()
            if path.exists():
                os.link(path, old)
        try:
            for new, path in zip(temporary, paths, strict=True):
                os.replace(new, path)
            sync(paths[0].parent)
        except BaseException:
            for path, old in zip(paths, kept, strict=True):
                if old.exists():
                    os.replace(old, path)
                else:
                    path.unlink(missing_ok=True)
            raise
    finally:
        for path in [*temporary, *kept]:
            path.unlink(missing_ok=True)


def _beside(path: Path, suffix: str) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=suffix, dir=path.parent)
    os.close(handle)
    return Path(name)


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
