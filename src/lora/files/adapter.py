"""An adapter's folder, `adapter_config.json` and `adapter_model.safetensors`: one reader, one writer.

`read` needs no torch: of the tensors it takes the header, and the bytes for the checksum.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoraError
from .commit import replaced_together
from .header import BLANK, CHECKSUM, CONFIG_FILE, TENSOR_FILE, Entry, read_header, seal, verified
from .settings import config_digest

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_DIGEST = "lora.config"


@dataclass(frozen=True)
class AdapterFile:
    """What a folder holds.

    config: `adapter_config.json` as it stands. entries: dtype and shape of each tensor. metadata: the header's other
    texts. nbytes: the tensor file's size. verified: whether its checksum comes out; None where it has none.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    metadata: dict[str, str]
    nbytes: int
    verified: bool | None

    @property
    def paired(self) -> bool:
        """Whether the two files were saved together, as far as they tell."""
        return self.metadata.get(CONFIG_DIGEST) in (None, config_digest(self.config))

    def tensors(self) -> dict[str, "Tensor"]:
        """The tensors by their keys, on the CPU.

        Raises:
            LoraError: damage.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.folder / TENSOR_FILE
        if self.verified is False:
            raise LoraError(f"{file}: it does not match its checksum, so it was damaged; copy it again")
        try:
            return load_file(file)
        except SafetensorError as error:
            raise LoraError(f"{file}: damaged ({error}); copy it again") from None


def read(folder: Path) -> AdapterFile:
    """Read a folder, ours or PEFT's.

    Raises:
        LoraError: a file is missing, is not what its name says, or is no LoRA adapter.
    """
    config = _read_config(folder)
    file = folder / TENSOR_FILE
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle, which can run code and is never read" if pickled else ""
        raise LoraError(f"adapter: {str(folder)!r} has no {TENSOR_FILE}{hint}; save the adapter as safetensors")
    entries, metadata = read_header(file)
    return AdapterFile(folder, config, entries, metadata, file.stat().st_size, verified(file, metadata))


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        nested = sorted(str(p.parent) for p in folder.glob(f"*/{CONFIG_FILE}")) if folder.is_dir() else []
        hint = f"; there is one in {', '.join(nested)}" if nested else ""
        lacks = f"has no {CONFIG_FILE}{hint}" if folder.exists() else "does not exist"
        raise LoraError(f"adapter: {str(folder)!r} {lacks}; give the directory that lora.save wrote")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{file}: is not JSON ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise LoraError(f"{file}: holds {type(config).__name__}; a JSON object is expected")
    if config.get("peft_type") != "LORA":
        raise LoraError(f"{file}: peft_type is {config.get('peft_type')!r}; this library reads 'LORA'")
    return config


def write(folder: Path, config: dict[str, Any], tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write both files, or neither: the tensors with the metadata, a checksum, and the digest of their settings."""
    from safetensors.torch import save_file

    # Clones: tied copies share memory, which safetensors refuses.
    plain = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    header = {"format": "pt", CHECKSUM: BLANK, **metadata, CONFIG_DIGEST: config_digest(config)}
    folder.mkdir(parents=True, exist_ok=True)
    with replaced_together(folder / TENSOR_FILE, folder / CONFIG_FILE) as (tensor_file, config_file):
        save_file(plain, tensor_file, header)
        seal(tensor_file)
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
