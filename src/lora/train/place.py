"""Where a run writes: its folder, locked, and what was there before. Needs no torch."""

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LoraError
from ..files.commit import locked, told
from ..files.header import CONFIG_FILE
from .manifest import manifest_of, sweep
from .recipe import RECIPE_FILE, RUN_FILE

FOLDER = "checkpoints"
_LOCK, _ENDED = "lock", "ended.json"
_STEP = "step-"


@dataclass(frozen=True)
class Place:
    """A run's folder: `out` for what is finished, `checkpoints` within it for the way back.

    occupied: an adapter is there already. It stays until another is finished, so what a run writes on the way goes to
    `live`, which is `checkpoints` then and `out` otherwise.
    """

    out: Path
    occupied: bool

    @property
    def checkpoints(self) -> Path:
        return self.out / FOLDER

    @property
    def live(self) -> Path:
        return self.checkpoints if self.occupied else self.out

    @property
    def recipe(self) -> Path:
        """The recipe of the run that the checkpoints are of, beside them: they are rotated, and it stays."""
        return self.checkpoints / RECIPE_FILE

    def step(self, number: int) -> Path:
        return self.checkpoints / f"{_STEP}{number:06d}"

    def steps(self) -> list[Path]:
        """The checkpoints that are there, whole or not, the newest first: by the start of their run, then by step."""
        found = self.checkpoints.glob(f"{_STEP}*") if self.checkpoints.is_dir() else ()
        return sorted((path for path in found if _number(path) is not None), key=_age, reverse=True)

    def newest_run(self) -> str | None:
        """Which run the newest checkpoint is of, by its manifest."""
        return next(
            (run for path in self.steps() if isinstance(run := (manifest_of(path) or {}).get("run"), str)), None
        )

    def ended(self, run: str, why: str) -> None:
        """Notes that a run went wrong by itself: what it left does not keep another from the folder."""
        (self.checkpoints / _ENDED).write_text(json.dumps({"run": run, "why": why}) + "\n", encoding="utf-8")

    def finished(self) -> dict[str, Any] | None:
        """The record of the run whose adapter is here."""
        return _read(self.out / RUN_FILE) if (self.out / CONFIG_FILE).exists() else None

    def elsewhere(self) -> Iterator[Path]:
        """Fresh folders for what cannot be saved to `out`: beside it, where the command runs, in the temporary one."""
        for parent in (self.out.parent, Path.cwd(), Path(tempfile.gettempdir())):
            with suppress(OSError):
                yield Path(tempfile.mkdtemp(prefix=f"{self.out.name}-", dir=parent))


def check(out: Path, force: bool, resume: str = "none") -> Place:
    """What stands against a run into this folder is told; nothing is written.

    Raises:
        LoraError: it is a file, cannot be written to, or holds an adapter or an unfinished run, and neither `force`
            nor `resume` says what to do with them.
    """
    place = Place(out, (out / CONFIG_FILE).exists())
    _check_writable(out)
    if force or resume != "none":
        return place
    if place.occupied:
        raise LoraError(f"out: {str(out)!r} already holds an adapter; give another folder, or --force to replace it")
    left = [path for path in place.steps() if (manifest_of(path) or {}).get("run") != _went_wrong(place)]
    if left:
        raise LoraError(
            f"out: {str(out)!r} holds a run that was not finished (its newest checkpoint is {left[0].name}); go on "
            "with it by --resume auto, start anew by --force, or give another folder"
        )
    return place


@contextmanager
def taken(out: Path, force: bool, resume: str = "none") -> Iterator[Place]:
    """The folder as a `Place`, kept from other runs meanwhile; what was made for it and stayed empty is removed.

    Raises:
        LoraError: as `check`, or another run is at work there.
    """
    place = check(out, force, resume)
    made = [folder for folder in (place.checkpoints, out, *out.parents) if not folder.exists()]
    with told(f"out: {str(out)!r} cannot be written to; give another folder"):
        place.checkpoints.mkdir(parents=True, exist_ok=True)
        lock = place.checkpoints / _LOCK
        lock.touch()
    try:
        with locked(lock, wait=False):
            mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            lock.write_text(json.dumps(mine) + "\n", encoding="utf-8")
            sweep(place.checkpoints)
            try:
                yield place
            finally:
                _tidy(place, made)
    except BlockingIOError as error:
        other = _read(lock) or {}
        raise LoraError(
            f"out: another run is at work in {str(out)!r}: process {other.get('pid')} on {other.get('host')}, since "
            f"{other.get('since')}; wait for it or give another folder"
        ) from error


def _tidy(place: Place, made: list[Path]) -> None:
    """Take away the lock file where nothing else is in its folder, and then the folders that were made for nothing."""
    with suppress(OSError):
        if [path.name for path in place.checkpoints.iterdir()] == [_LOCK]:
            (place.checkpoints / _LOCK).unlink()
            place.checkpoints.rmdir()
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def _check_writable(out: Path) -> None:
    for folder in (out, *out.parents):
        if folder.is_dir():
            if not os.access(folder, os.W_OK | os.X_OK):
                raise LoraError(f"out: {str(folder)!r} cannot be written to; give another folder")
            return
        if folder.exists():
            raise LoraError(f"out: {str(folder)!r} is a file; give a folder")


def _went_wrong(place: Place) -> Any:
    return (_read(place.checkpoints / _ENDED) or {}).get("run", "")


def _age(path: Path) -> tuple[float, int]:
    started = (manifest_of(path) or {}).get("started", 0.0)
    return (started if isinstance(started, float) else 0.0), _number(path) or 0


def _number(path: Path) -> int | None:
    digits = path.name.removeprefix(_STEP)
    return int(digits) if digits.isdigit() and len(digits) < 16 and path.is_dir() else None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
