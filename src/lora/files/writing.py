"""An adapter's folder, written: the rename of the tensor file, whose header has the settings too, is the commit."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoraError
from .adapter import CHUNK, CONFIG_DIGEST, REPLACES, SETTINGS, AdapterFile, reading
from .commit import locked, replaced_together, sweep, told
from .forms import form_of
from .header import CONFIG_FILE, TENSOR_FILE
from .tensors import write_tensors

if TYPE_CHECKING:
    from torch import Tensor


def write(folder: Path, config: dict[str, Any], tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write the tensors with the metadata, the settings and a checksum, which is the commit, then the config.

    A config that has these settings already is left alone, and a link to a file is kept: what it leads to is replaced.
    A copy of one tensor is in memory at a time.

    Raises:
        LoraError: the folder cannot be written to, which then holds what it held before.
    """
    text = json.dumps(config, indent=2) + "\n"
    with told(f"{folder}: the adapter could not be saved, and what is there is as it was"):
        folder.mkdir(parents=True, exist_ok=True)
        files = [Path(os.path.realpath(folder / name)) for name in (TENSOR_FILE, CONFIG_FILE)]
        for file in files:
            if file.is_dir():
                raise LoraError(f"{file}: is a folder, and a file of the adapter has to stand there; move it away")
        with locked(files[0].parent) as alone:
            for file in files if alone else ():
                sweep(file, "tmp")
            before, after = _digest_of(files[1]), hashlib.sha256(text.encode()).hexdigest()
            order = files[:1] if before == after else files
            if not before and not files[0].exists():
                order, before = files[::-1], after  # the first save: the config alone is no adapter yet
            header = {**metadata, CONFIG_DIGEST: form_of(config).digest(config), SETTINGS: text, REPLACES: before}
            with replaced_together(*order) as temporary:
                for file, new in zip(order, temporary, strict=True):
                    if file == files[0]:
                        write_tensors(new, tensors, header)
                    else:
                        new.write_text(text, encoding="utf-8")
            for file in files if alone else ():
                sweep(file, "old")  # a save of an earlier version that was ended kept the old files so


def _digest_of(file: Path) -> str:
    digest = hashlib.sha256()
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def repair(file: AdapterFile) -> None:
    """Give a torn pair its adapter_config.json, where the folder can be written to and nobody is saving into it."""
    if file.torn is None:
        return
    config = Path(os.path.realpath(file.folder / CONFIG_FILE))
    with suppress(OSError, LoraError), locked(Path(os.path.realpath(file.folder / TENSOR_FILE)).parent, wait=False):
        if reading(file.folder, lambda now: now.torn) == file.torn:
            with replaced_together(config) as (new,):
                new.write_text(file.torn, encoding="utf-8")
