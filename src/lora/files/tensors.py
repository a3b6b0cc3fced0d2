"""A safetensors file of tensors that are no adapter, written with its checksum and read back; nothing is unpickled."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LoraError
from .header import BLANK, Entry, header_bytes, read_header

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(file: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write the tensors, with their checksum and `metadata` in the header. A copy of one is in memory at a time."""
    import torch

    # The order of safetensors' own writer, in which each tensor's place is a multiple of its elements' size.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    kinds = {key: str(tensors[key].dtype).removeprefix("torch.") for key in order}
    header = header_bytes({key: Entry(kinds[key], tuple(tensors[key].shape)) for key in order}, metadata)
    digest = hashlib.sha256(header)
    with file.open("wb") as opened:
        opened.write(header)
        for key in order:
            # A copy: what is hashed is what is written, whoever trains on meanwhile.
            values = tensors[key].detach().to("cpu", copy=True).contiguous().view(-1).view(torch.uint8).numpy().data
            opened.write(values)
            digest.update(values)
            del values  # before the next one is copied
        opened.seek(header.index(BLANK.encode()))
        opened.write(digest.hexdigest().encode())


def read_tensors(file: Path) -> dict[str, "Tensor"]:
    """The tensors of a file by `write_tensors`, on the CPU. The caller knows that it is whole.

    Raises:
        LoraError: the file is no safetensors file, or holds what no file of ours does.
    """
    import torch

    found = {}
    with file.open("rb") as source:
        entries, _, _ = read_header(source, file, file.stat().st_size)
        for key, entry in entries.items():
            if not entry.known:
                raise LoraError(f"{file}: {key} is {entry.dtype}; the file is not one that this library wrote")
            values = torch.empty(entry.nbytes, dtype=torch.uint8)
            source.readinto(values.numpy().data)
            found[key] = values.view(getattr(torch, entry.dtype)).view(entry.shape)
    return found
