"""An adapter's folder, `adapter_config.json` and `adapter_model.safetensors`, read: one reader for all.

The tensor file's header holds the settings too, so its rename is the commit of a save, and `adapter_config.json`
follows. A reader that finds the file of before takes the settings of the header: `AdapterFile.torn`.

Reading needs no torch but for the tensors themselves.
"""

import hashlib
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import LoraError
from .bounded import clip, parse
from .commit import told
from .forms import form_of
from .header import BLANK, CHECKSUM, CONFIG_FILE, PREFIX, TENSOR_FILE, Entry, read_header

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_DIGEST = "lora.config"  # of what gives the tensors their meaning
SETTINGS = "lora.settings"  # the text of adapter_config.json
REPLACES = "lora.replaces"  # the SHA-256 of the adapter_config.json that was there before, nothing for none
LONGEST = 8 << 20  # of adapter_config.json, in bytes
CHUNK = 1 << 20
TRIES = 100
T = TypeVar("T")


@dataclass(frozen=True)
class AdapterFile:
    """What a folder holds, from one state of it; the tensor file stays open, so that what is read later is the same.

    config: the settings. entries: dtype and shape of each tensor. metadata: the header's other texts. nbytes: the
    tensor file's size. torn: the text that adapter_config.json should have, where a save was ended between its two
    files and `config` is the header's. header: the bytes before the data. source: the open tensor file.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    metadata: dict[str, str]
    nbytes: int
    torn: str | None
    header: bytes
    source: BufferedReader

    @property
    def paired(self) -> bool:
        """Whether the two files were saved together, as far as they tell."""
        return self.metadata.get(CONFIG_DIGEST) in (None, form_of(self.config).digest(self.config))

    @property
    def modules(self) -> dict[str, list[str]]:
        """The keys of the tensors of each module that holds an update, by its full name in the base."""
        found: dict[str, list[str]] = {}
        for key in self.entries:
            name, mark, _ = key.removeprefix(PREFIX).partition(form_of(self.config).mark)
            if mark:
                found.setdefault(name, []).append(key)
        return found

    @cached_property
    def verified(self) -> bool | None:
        """Whether the checksum comes out; None where there is none. Reads the file once."""
        digest = self._digest()
        self.source.seek(len(self.header))
        while CHECKSUM in self.metadata and (chunk := self.source.read(CHUNK)):
            digest.update(chunk)
        return self._comes_out(digest)

    def tensors(self) -> dict[str, "Tensor"]:
        """The tensors by their keys, on the CPU, each in memory of its own. Reads the file once.

        Raises:
            LoraError: damage.
        """
        import torch

        file = self.folder / TENSOR_FILE
        digest, found = self._digest(), {}
        with told(f"{file}: cannot be read"):
            self.source.seek(len(self.header))
            for key, entry in self.entries.items():
                if not entry.known:
                    raise LoraError(f"{file}: {clip(key, 200)} is {entry.dtype}, which no adapter holds; convert it")
                values = torch.empty(entry.nbytes, dtype=torch.uint8)
                if self.source.readinto(values.numpy().data) != entry.nbytes:
                    raise LoraError(f"{file}: cut short while it was read; copy it again")
                digest.update(values.numpy().data)
                found[key] = values.view(getattr(torch, entry.dtype)).view(entry.shape)
        if self._comes_out(digest) is False:
            raise LoraError(f"{file}: it does not match its checksum, so it was damaged; copy it again")
        return found

    def _digest(self) -> Any:
        recorded = self.metadata.get(CHECKSUM, "").encode()
        return hashlib.sha256(self.header.replace(recorded, BLANK.encode(), 1) if recorded else self.header)

    def _comes_out(self, digest: Any) -> bool | None:
        recorded = self.metadata.get(CHECKSUM)
        if recorded is None:  # a file of ours always has one: where it is gone, the header was damaged
            return False if any(key.startswith("lora.") for key in self.metadata) else None
        return bool(digest.hexdigest() == recorded)


def read(folder: Path) -> AdapterFile:
    """Read a folder, ours or PEFT's.

    Raises:
        LoraError: a file is missing, is not what its name says, or is no adapter that the library knows.
    """
    return reading(folder, lambda file: file)


def reading(folder: Path, use: Callable[[AdapterFile], T]) -> T:
    """`use` of what one state of the folder holds. What failed because somebody wrote meanwhile is done again.

    Raises:
        LoraError: as `read` and `use`.
    """
    for left in reversed(range(TRIES)):
        source, stamp = _opened(folder)
        try:
            file, settled = _read(folder, source, stamp)
            # Opened before the settings were read: if it is there still, they are not those of a later save.
            if settled or _stamp(folder) == stamp:
                return use(file)
        except LoraError:
            if not left or _stamp(folder) == stamp:
                raise
    raise LoraError(f"{folder}: it was written over {TRIES} times while it was read; read it when nobody writes")


def _opened(folder: Path) -> tuple[BufferedReader, tuple[int, ...]]:
    """The tensor file, and what tells it from another that comes to its place."""
    file = folder / TENSOR_FILE
    with told(f"{folder}: cannot be read"):
        if file.is_file():
            source = file.open("rb")
            return source, _stamp_of(os.fstat(source.fileno()))
        if (folder / CONFIG_FILE).is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            hint = "; adapter_model.bin is a pickle, which can run code and is never read" if pickled else ""
            raise LoraError(f"adapter: {str(folder)!r} has no {TENSOR_FILE}{hint}; save the adapter as safetensors")
        raise _without_config(folder)


def _stamp_of(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _stamp(folder: Path) -> tuple[int, ...] | None:
    try:
        return _stamp_of(os.stat(folder / TENSOR_FILE))
    except OSError:
        return None


def _without_config(folder: Path) -> LoraError:
    nested = sorted(str(p.parent) for p in folder.glob(f"*/{CONFIG_FILE}")) if folder.is_dir() else []
    hint = f"; there is one in {', '.join(nested[:8])}" if nested else ""
    lacks = f"has no {CONFIG_FILE}{hint}" if folder.exists() else "does not exist"
    return LoraError(f"adapter: {str(folder)!r} {lacks}; give the directory that lora.save wrote")


def _read(folder: Path, source: BufferedReader, stamp: tuple[int, ...]) -> tuple[AdapterFile, bool]:
    """(what the folder holds, whether the settings are those that were saved with the tensors for certain)"""
    try:
        with told(f"{folder}: cannot be read"):
            raw = _config_bytes(folder)
            entries, metadata, header = read_header(source, folder / TENSOR_FILE, stamp[2])
        settings = metadata.pop(SETTINGS, None) if CHECKSUM in metadata else None
        replaces = metadata.pop(REPLACES, None) if settings is not None else None
        same = settings is not None and raw == settings.encode()
        # Edited by hand, it is neither the one that was saved nor the one that stood there before.
        torn = (
            settings if not same and replaces == (hashlib.sha256(raw).hexdigest() if raw is not None else "") else None
        )
        if torn is None and raw is None:
            raise _without_config(folder)
        config = _config(folder / CONFIG_FILE, torn.encode() if torn is not None else raw or b"")
        file = AdapterFile(folder, config, entries, metadata, stamp[2], torn, header, source)
    except BaseException:
        source.close()
        raise
    weakref.finalize(file, source.close)
    return file, same or torn is not None


def _config_bytes(folder: Path) -> bytes | None:
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        raw = opened.read(LONGEST + 1)
    if len(raw) > LONGEST:
        raise LoraError(f"{file}: is longer than {LONGEST:,} bytes, which no settings are; copy it again")
    return raw


def _config(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        config = parse(raw)
    except ValueError as error:
        raise LoraError(f"{file}: is not JSON ({clip(error, 200)}); copy it again") from None
    if not isinstance(config, dict):
        raise LoraError(f"{file}: holds {type(config).__name__}; a JSON object is expected")
    form_of(config, str(file)).check(config, str(file))
    return config
