"""What an adapter folder holds, read from its config and its safetensors header: no torch, no base model."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import lookup
from ..errors import LoraError
from .header import CONFIG_FILE, PREFIX, TENSOR_FILE, read_header, verified

_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(?:\.weight)?")
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Tensor:
    """One entry of the header."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass
class Target:
    """The update of all modules of one name, shapes and scaling; a layer's number is written `*`."""

    name: str
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float | None = None
    modules: int = 0

    @property
    def parameters(self) -> int:
        return self.modules * sum(half.size for half in (self.a, self.b) if half is not None)


@dataclass
class Description:
    """`str()` of it is what `lora inspect` prints."""

    folder: Path
    config: dict[str, Any]
    targets: list[Target]
    others: list[Target]
    nbytes: int
    verified: bool | None
    incomplete: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(target.parameters for target in [*self.targets, *self.others])

    def __str__(self) -> str:
        rows = [["target", "modules", "A", "B", "r", "scaling", "parameters"]]
        for target in self.targets:
            assert target.a is not None
            assert target.b is not None
            rows.append(
                [
                    target.name,
                    str(target.modules),
                    _size(target.a),
                    _size(target.b),
                    str(target.a.shape[0]),
                    "-" if target.scaling is None else f"{target.scaling:g}",
                    f"{target.parameters:,}",
                ]
            )
        for other in self.others:
            assert other.a is not None
            rows.append([other.name, str(other.modules), _size(other.a), "", "", "", f"{other.parameters:,}"])
        dtypes = sorted(
            {half.dtype for target in [*self.targets, *self.others] for half in (target.a, target.b) if half}
        )
        lines = [
            _table(rows),
            f"total {self.parameters:,} parameters, {self.nbytes:,} bytes, {', '.join(dtypes)}",
            f"base model: {self.config.get('base_model_name_or_path') or 'not recorded'}",
            self._settings(),
            {
                True: "checksum: verified",
                False: "checksum: WRONG, the file was damaged; copy it again",
                None: "checksum: not recorded",
            }[self.verified],
        ]
        lines += [f"INCOMPLETE: {module} has only one of A and B" for module in self.incomplete]
        return "\n".join(lines)

    def _settings(self) -> str:
        config = self.config
        parts = [f"r {config.get('r')}, alpha {config.get('lora_alpha')}, dropout {config.get('lora_dropout', 0)}"]
        parts += [name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if config.get(key)]
        if config.get("bias", "none") != "none":
            parts.append(f"bias {config['bias']}")
        if config.get("modules_to_save"):
            parts.append(f"trained whole: {', '.join(config['modules_to_save'])}")
        return "settings: " + ", ".join(parts)


def describe(folder: Path) -> Description:
    """Reads the folder's two files; of the tensors only the header, and the bytes for the checksum.

    Raises:
        LoraError: a file is missing, is not what its name says, or is no LoRA adapter.
    """
    config = _read_config(folder)
    file = folder / TENSOR_FILE
    tensors, metadata = _read_tensors(folder)
    targets, others, incomplete = _group(tensors, config)
    return Description(folder, config, targets, others, file.stat().st_size, verified(file, metadata), incomplete)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file; give its folder" if folder.exists() else "is not there; give an adapter's folder"
        raise LoraError(f"adapter: {str(folder)!r} {what}")
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise LoraError(f"adapter: {str(folder)!r} has no {CONFIG_FILE}; give the folder that an adapter was saved to")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraError(f"adapter: {str(file)!r} is not JSON: {error}; copy it again") from error
    if not isinstance(config, dict):
        raise LoraError(f"adapter: {str(file)!r} holds {type(config).__name__}; it must be an object; copy it again")
    if config.get("peft_type", "LORA") != "LORA":
        raise LoraError(f"adapter: {str(file)!r} is a {config['peft_type']!r} adapter; this command reads 'LORA'")
    return config


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    file = folder / TENSOR_FILE
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle, which can run code and is never read" if pickled else ""
        raise LoraError(f"adapter: {str(folder)!r} has no {TENSOR_FILE}{hint}; save the adapter as safetensors")
    try:
        header, metadata = read_header(file)
        return {
            key: Tensor(_DTYPES.get(entry["dtype"], entry["dtype"].lower()), tuple(map(int, entry["shape"])))
            for key, entry in header.items()
        }, metadata
    except LoraError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise LoraError(f"adapter: the header of {str(file)!r} is damaged ({error!r}); copy it again") from error


def _group(tensors: dict[str, Tensor], config: dict[str, Any]) -> tuple[list[Target], list[Target], list[str]]:
    """(targets, tensors that are no half of an update, modules with only one half)."""
    halves: dict[str, dict[str, Tensor]] = {}
    targets: dict[tuple[Any, ...], Target] = {}
    others: dict[tuple[Any, ...], Target] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _HALF.fullmatch(name)
        if match is None:
            other = others.setdefault((_starred(name), tensor), Target(_starred(name), tensor))
            other.modules += 1
        else:
            halves.setdefault(match["module"], {})[match["half"]] = tensor
    incomplete = sorted(module for module, pair in halves.items() if len(pair) == 1)
    for module in sorted(halves.keys() - set(incomplete), key=_natural):
        a, b = halves[module]["A"], halves[module]["B"]
        scaling = _scaling(module, a.shape[0], config)
        target = targets.setdefault((_starred(module), a, b, scaling), Target(_starred(module), a, b, scaling))
        target.modules += 1
    return list(targets.values()), list(others.values()), incomplete


def _scaling(module: str, rank: int, config: dict[str, Any]) -> float | None:
    pattern = config.get("alpha_pattern") or {}
    key = lookup(pattern, module)
    alpha = config.get("lora_alpha") if key is None else pattern[key]
    if not isinstance(alpha, int | float) or rank < 1:
        return None
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under a rule; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])])
