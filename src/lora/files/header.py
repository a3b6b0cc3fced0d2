"""The safetensors file of an adapter as bytes: its header, and a checksum over all of it. Needs no torch."""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LoraError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
CHECKSUM = "lora.sha256"
BLANK = "0" * 64
_DTYPES = {  # names in torch, and bytes
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I64": ("int64", 8),
    "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """({tensor name: entry}, metadata) of a safetensors file.

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
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata holds something else than text")
        end = 0
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            end = _end(key, entry, end)
        if file.stat().st_size != 8 + length + end:
            raise ValueError("it has another length than its header says")
        entries = {
            key: Entry(_DTYPES.get(e["dtype"], (e["dtype"].lower(),))[0], tuple(e["shape"]))
            for key, e in header.items()
        }
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise LoraError(f"{file}: damaged, cut short or no safetensors file ({error}); copy it again") from None
    return entries, metadata


def _end(key: str, entry: dict[str, Any], start: int) -> int:
    """Where the tensor ends that has to start at `start`, so that the file has no gap and no byte twice."""
    begin, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (begin, end, *entry["shape"])) or begin != start or end < begin:
        raise ValueError(f"{key} has a wrong shape or place")
    if entry["dtype"] in _DTYPES and end - begin != math.prod(entry["shape"]) * _DTYPES[entry["dtype"]][1]:
        raise ValueError(f"{key} has another length than its shape says")
    return int(end)


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
