"""The header of an adapter's safetensors file, read and written as bytes. Needs no torch."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import LoraError
from .bounded import VALUES, clip, parse

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
CHECKSUM = "lora.sha256"
LABELS = "lora.labels"  # what a classifier calls its outputs, in their order, as JSON
BLANK = "0" * 64
LONGEST = 32 << 20  # of a header, in bytes: some 200,000 tensors
_DTYPES = {  # names in torch, and bytes
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I64": ("int64", 8),
    "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1),
}  # fmt: skip
_SIZES = dict(_DTYPES.values())
_CODES = {name: code for code, (name, _) in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor. dtype: torch's name, or the file's in small letters where it is another."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def known(self) -> bool:
        """Whether an adapter may have tensors of its dtype."""
        return self.dtype in _SIZES

    @property
    def nbytes(self) -> int:
        return self.size * _SIZES[self.dtype]

    @property
    def floating(self) -> bool:
        return "float" in self.dtype


def read_header(source: BinaryIO, file: Path, nbytes: int) -> tuple[dict[str, Entry], dict[str, str], bytes]:
    """({tensor name: entry} in the order of the data, metadata, the bytes before the data) of a safetensors file.

    Args:
        source: the file, at its start.
        file: its path, for errors.
        nbytes: its size.

    Raises:
        LoraError: the file is cut short or is not one.
    """
    try:
        start = source.read(8)
        (length,) = struct.unpack("<Q", start)
        if length > min(nbytes - 8, LONGEST):
            raise ValueError(f"the header is longer than the file, or than {LONGEST:,} bytes")
        raw = source.read(length)
        header = parse(raw, VALUES + nbytes // 64)  # a tensor has 9, and 64 bytes of memory go to each
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata holds something else than text")
        end, entries = 0, {}
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            entries[key], end = _entry(key, entry, end)
        if nbytes != 8 + length + end:
            raise ValueError("it has another length than its header says")
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        why = clip(error, 200)
        raise LoraError(f"{file}: damaged, cut short or no safetensors file ({why}); copy it again") from None
    return entries, metadata, start + raw


def _entry(key: str, entry: dict[str, Any], start: int) -> tuple[Entry, int]:
    """(what is said of a tensor, its end); it has to start at `start`, so that there is no gap and no byte twice."""
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], entry["shape"]
    numbers = [begin, end, *shape] if isinstance(shape, list) and len(shape) < 16 else [-1]
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers) or begin != start or end < begin:
        raise ValueError(f"{clip(key)} has a wrong shape or place")
    if not isinstance(dtype, str) or len(dtype) > 16:
        raise ValueError(f"{clip(key)} has a dtype of no name")
    found = Entry(_DTYPES.get(dtype, (dtype.lower(),))[0], tuple(shape))
    if found.size > (end - begin) * 8 or (found.known and found.nbytes != end - begin):
        raise ValueError(f"{clip(key)} has another length than its shape says")
    return found, end


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data of tensors that follow one another in this order, with the checksum blank."""
    texts = {"format": "pt", CHECKSUM: BLANK, **metadata}  # nothing before the checksum can look like its blank
    header: dict[str, Any] = {"__metadata__": texts}
    end = 0
    for key, entry in entries.items():
        if not entry.known:
            raise LoraError(f"model: {key} is {entry.dtype}; a file of an adapter holds {', '.join(_CODES)}")
        header[key] = {
            "dtype": _CODES[entry.dtype], "shape": entry.shape, "data_offsets": [end, end + entry.nbytes],
        }  # fmt: skip
        end += entry.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
