"""A folder of files that is there whole or not at all: hashes of all in a manifest, written last, then a rename."""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files.commit import sync, sync_folder

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextmanager
def committed(folder: Path, notes: dict[str, Any]) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, to be filled with files; on success it is renamed to it, else deleted.

    Each file and the folder are synced to disk first, and manifest.json, with `notes` and the size and SHA-256 of each
    file, is written when they are.
    """
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        files = {}
        for file in sorted(temporary.iterdir()):
            sync(file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        manifest = temporary / MANIFEST
        manifest.write_text(json.dumps({**notes, "files": files}, indent=2) + "\n", encoding="utf-8")
        sync(manifest)
        sync_folder(temporary)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what writers into `folder` that were killed have left; only for who has locked it."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What a folder's manifest says; None where there is none, or it is none."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
        entries = found["files"].values()
        sound = all(isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in entries)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return found if sound else None


def faults(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """What is wrong with the files that a manifest lists, by their names. Reads them all."""
    wrong = {}
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            wrong[name] = "is missing"
        elif file.stat().st_size != entry["bytes"]:
            wrong[name] = f"has {file.stat().st_size:,} bytes, not {entry['bytes']:,}"
        elif sha256(file) != entry["sha256"]:
            wrong[name] = "does not match its SHA-256"
    return wrong


def sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
