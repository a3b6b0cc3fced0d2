"""What the attacks on files work on: a small net, adapters of it saved by us and by PEFT, and how one is recognized."""

import hashlib
import json
import random
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lora

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CHECKSUM, BLANK = "lora.sha256", "0" * 64
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.q_proj(x) * self.v_proj(x)


class Net(nn.Module):
    """Two layers of two linears, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def effect(model: nn.Module) -> str:
    """A hash of all that a loaded adapter is: its tensors, and by way of the output its scaling and targets."""
    found = hashlib.sha256()
    with torch.no_grad():
        for key, value in [*sorted(model.state_dict().items()), ("output", model(X))]:
            found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def surroundings(model: nn.Module) -> tuple:
    """What a refused load must leave alone: classes, parameters, their values, random numbers."""
    values = hashlib.sha256()
    for key, value in model.state_dict().items():
        values.update(key.encode() + value.numpy().tobytes())
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        values.hexdigest(), torch.get_rng_state().numpy().tobytes(), random.getstate(),
    )  # fmt: skip


@dataclass
class Original:
    """An adapter's two files before an attack; `other` is another save in the same form."""

    name: str
    sealed: bool
    config: bytes
    tensors: bytes
    effect: str
    other: "Original | None" = None

    def parts(self) -> tuple[dict, bytes]:
        """(header, data)"""
        (length,) = struct.unpack("<Q", self.tensors[:8])
        return json.loads(self.tensors[8 : 8 + length]), self.tensors[8 + length :]


def _filled(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def _ours(folder: Path, seed: int, settings: dict) -> None:
    model = net()
    lora.inject(model, **settings)
    lora.save(_filled(model, seed), folder)


def _pefts(folder: Path, seed: int, settings: dict) -> None:
    import peft

    _filled(peft.get_peft_model(net(), peft.LoraConfig(**settings)), seed).save_pretrained(folder)


PATTERNS = {"rank_pattern": {"layers.1.q_proj": 3}, "alpha_pattern": {"v_proj": 5}}
FORMS = {
    "ours": (_ours, {"r": 2, "alpha": 3, "targets": ["q_proj", "v_proj"], **PATTERNS}),
    "ours, all kinds": (_ours, {"r": 2, "targets": r".*\.(q|v)_proj", "dora": True, "rslora": True, "bias": "all", "train": ["norm"], "layers": [0]}),  # noqa: E501  (a row of a table)
    "PEFT's": (_pefts, {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], **PATTERNS}),
    "PEFT's, all kinds": (_pefts, {"r": 2, "lora_alpha": 3, "target_modules": r".*\.(q|v)_proj", "use_dora": True, "modules_to_save": ["norm"]}),  # noqa: E501  (a row of a table)
}  # fmt: skip


def originals(place: Path, forms: Sequence[str] = tuple(FORMS)) -> list[Original]:
    """One adapter of each form with another save as its `other`; each has been loaded once."""
    found = []
    for number, name in enumerate(forms):
        save, settings = FORMS[name]
        pair = []
        for seed in (1, 2):
            folder = place / f"original-{number}-{seed}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # The other has another scaling, so that one file of each is no adapter.
                save(
                    folder, seed, settings if seed == 1 else {**settings, "alpha" if save is _ours else "lora_alpha": 7}
                )
            files = [(folder / file).read_bytes() for file in (CONFIG, TENSORS)]
            pair.append(Original(name, save is _ours, *files, effect(lora.load(net(), folder))))
        pair[0].other = pair[1]
        found.append(pair[0])
    return found
