"""The safetensors file of an adapter as bytes: its header, and a checksum over all of it. Needs no torch."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from ..errors import LoraError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
CHECKSUM = "lora.sha256"
BLANK = "0" * 64


def read_header(file: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """({tensor name: {"dtype", "shape", "data_offsets"}}, metadata) of a safetensors file.

    Raises:
        LoraError: the file is cut short or is not one.
    """
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > file.stat().st_size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(opened.read(length))
        metadata = header.pop("__metadata__", {})
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if file.stat().st_size != 8 + length + max(ends, default=0):
            raise ValueError("it has another length than its header says")
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise LoraError(f"{file}: damaged, cut short or no safetensors file ({error}); copy it again") from None
    return header, metadata


def seal(file: Path) -> None:
    """Put the checksum in the place of the blank that the metadata was written with."""
    content = file.read_bytes()
    place = content.index(BLANK.encode())
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(hashlib.sha256(content).hexdigest().encode())


def verified(file: Path, metadata: dict[str, str]) -> bool | None:
    """Whether the file is as it was written, to the bit; None when it has no checksum."""
    recorded = metadata.get(CHECKSUM)
    if recorded is None:  # a file of ours always has one: where it is gone, the header was damaged
        return False if any(key.startswith("lora.") for key in metadata) else None
    content = file.read_bytes()
    return hashlib.sha256(content.replace(recorded.encode(), BLANK.encode(), 1)).hexdigest() == recorded
