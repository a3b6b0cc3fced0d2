"""What an adapter folder holds, read from its config and its safetensors header: no torch, no base model."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import AdapterConfig, LoraConfig, scaling
from ..tables import size, starred, table
from . import prompts
from .adapter import AdapterFile, reading
from .bounded import clip
from .forms import form_of
from .header import CONFIG_FILE, PREFIX, Entry
from .settings import check_cost, config_of

_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(?:\.weight)?")

_CHECKED = {True: "verified", False: "wrong", None: "not recorded"}
_CHECKSUM = {True: "verified", False: "WRONG, the file was damaged; copy it again", None: "not recorded"}


@dataclass
class Target:
    """The update of all modules of one name, shapes and scaling; a layer's number is written `*`."""

    name: str
    a: Entry | None = None
    b: Entry | None = None
    scaling: float | None = None
    modules: int = 0

    @property
    def parameters(self) -> int:
        return self.modules * sum(half.size for half in (self.a, self.b) if half is not None)

    def as_dict(self) -> dict[str, Any]:
        halves = {"A" if self.b else "tensor": self.a, "B": self.b}
        shapes = {name: {"shape": list(half.shape), "dtype": half.dtype} for name, half in halves.items() if half}
        return {
            "name": self.name, "modules": self.modules, **shapes, "scaling": self.scaling,
            "parameters": self.parameters,
        }  # fmt: skip


@dataclass
class Description:
    """`str()` of it is what `lora inspect` prints."""

    file: AdapterFile
    targets: list[Target] = field(default_factory=list)
    others: list[Target] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(target.parameters for target in [*self.targets, *self.others])

    @property
    def damaged(self) -> bool:
        return self.file.verified is False or bool(self.incomplete)

    def __str__(self) -> str:
        rows = []
        for target in self.targets:
            assert target.a is not None and target.b is not None
            scale = "-" if target.scaling is None else f"{target.scaling:g}"
            sizes = [size(target.a.shape), size(target.b.shape), str(target.a.shape[0])]
            rows.append([target.name, str(target.modules), *sizes, scale, f"{target.parameters:,}"])
        for other in self.others:
            assert other.a is not None
            rows.append([other.name, str(other.modules), size(other.a.shape), "", "", "", f"{other.parameters:,}"])
        both = [half for target in [*self.targets, *self.others] for half in (target.a, target.b)]
        dtypes = sorted({half.dtype for half in both if half})
        lines = [
            table(["target", "modules", "A", "B", "r", "scaling", "parameters"], rows),
            f"total {self.parameters:,} parameters, {self.file.nbytes:,} bytes, {', '.join(dtypes)}",
            f"base model: {clip(self.file.config.get('base_model_name_or_path') or 'not recorded', 200)}",
            self._settings(),
            f"checksum: {_CHECKSUM[self.file.verified]}",
        ]
        lines += [f"INCOMPLETE: {clip(module, 200)} has only one of A and B" for module in self.incomplete]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return {
            "targets": [target.as_dict() for target in self.targets],
            "others": [other.as_dict() for other in self.others],
            "parameters": self.parameters, "bytes": self.file.nbytes, "checksum": _CHECKED[self.file.verified],
            "incomplete": self.incomplete, "damaged": self.damaged, "settings": self.file.config,
        }  # fmt: skip

    def _settings(self) -> str:
        config = self.file.config
        if config["peft_type"] == "ADAPTION_PROMPT":
            return "settings: " + prompts.words(config, CONFIG_FILE)
        found = config_of(config, CONFIG_FILE)
        parts = [f"r {config.get('r')}, alpha {config.get('lora_alpha')}, dropout {config.get('lora_dropout', 0)}"]
        parts += [name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if config.get(key)]
        if config.get("lora_update"):
            parts.append(f"update {clip(found.update)}")
        if found.bias != "none":
            parts.append(f"bias {found.bias}")
        if found.train:
            parts.append(f"trained whole: {clip(', '.join(found.train), 300)}")
        return "settings: " + ", ".join(parts)


def describe(folder: Path) -> Description:
    """What a folder holds, from its settings and the header of its tensors.

    Raises:
        LoraError: a file is missing, is not what its name says, or is no adapter that is known.
    """
    return reading(folder, _description)


def _description(file: AdapterFile) -> Description:
    file.verified  # noqa: B018  (from the state of the folder that the rest is from)
    where = str(file.folder / CONFIG_FILE)
    config = form_of(file.config).check(file.config, where)
    halves: dict[str, dict[str, Entry]] = {}
    targets: dict[tuple[Any, ...], Target] = {}
    others: dict[tuple[Any, ...], Target] = {}
    for key, entry in file.entries.items():
        name = key.removeprefix(PREFIX)
        match = _HALF.fullmatch(name) if entry.shape else None
        if match is None:
            shown = clip(starred(name), 200)
            others.setdefault((shown, entry), Target(shown, entry)).modules += 1
        else:
            halves.setdefault(match["module"], {})[match["half"]] = entry
    if isinstance(config, LoraConfig):
        check_cost(config, list(halves), where)
    incomplete = sorted(module for module, pair in halves.items() if len(pair) == 1)
    for module in sorted(halves.keys() - set(incomplete), key=natural):
        a, b = halves[module]["A"], halves[module]["B"]
        found = clip(starred(module), 200), a, b, _scaling(module, a, config)
        targets.setdefault(found, Target(*found)).modules += 1
    return Description(file, list(targets.values()), list(others.values()), incomplete)


def _scaling(module: str, a: Entry, config: AdapterConfig) -> float | None:
    """None for an update of no rank, or of another form."""
    if not isinstance(config, LoraConfig) or not a.shape[0]:
        return None
    assert config.alpha is not None
    return scaling(module, config.alpha, config.alpha_pattern, a.shape[0], config.rslora)


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in name.split(".")]
