"""load_published: an adapter in the layout of the paper's own checkpoints."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic import alone, whole_or_not
from ..config import PromptConfig, check_name
from ..errors import LoraError
from ..injection import fresh_parts, install, new_adapter
from ..layers import attentions
from ..resident import unwrap

PROMPTS = "adapter_query.weight"


def load_published(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, trainable: bool = False
) -> nn.Module:
    """Read an adapter in the layout of the paper's checkpoints, and make it act alone; `lora.save` writes it as ours.

    The layout: `adapter_query.weight` (layers * prompts, hidden), the lowest adapted layer first, and for each layer N
    `layers.N.attention.gate` (1, heads, 1, 1). The layers with a gate say which are adapted: the topmost.

    Args:
        path: a safetensors file, or one of torch.save that holds nothing but tensors (what it could run is not run).
        name: what to call the adapter here.
        trainable: whether it may be trained further.

    Returns:
        The same model.

    Raises:
        LoraError: what is missing, unexpected or of another shape, by name; the model is as it was.
    """
    root = unwrap(model, changing=True)
    with alone():
        check_name(name)
        file = Path(path)
        tensors = _tensors(file)
        gates, config = _meant(file, tensors, len(attentions(root)))
        adapter = new_adapter(root, name, config)
        parts = fresh_parts(root, {}, config, loading=True)
        prompts = tensors[PROMPTS]
        for (_, _, part), rows, gate in zip(parts, prompts.chunk(len(gates)), gates, strict=True):
            _fill(file, part.prompts, rows[None], PROMPTS)
            _fill(file, part.gate, gate, "layers.N.attention.gate")
        whole_or_not(root, lambda _: install(root, adapter, parts, trainable))
    return model


def _tensors(file: Path) -> dict[str, Tensor]:
    """The file's tensors; a checkpoint of a training run has them under "model"."""
    if not file.is_file():
        raise LoraError(f"path: {str(file)!r} is no file; lora.load reads a folder that lora.save or PEFT wrote")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of whichever library; nothing has changed yet
        raise LoraError(f"{file}: cannot be read as tensors alone ({error}); save it as safetensors") from error
    found = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise LoraError(f"{file}: holds a {type(found).__name__}; a dict of tensors is expected")
    return found


def _meant(file: Path, tensors: dict[str, Tensor], there: int) -> tuple[list[Tensor], PromptConfig]:
    """(the gates, the lowest layer first; the settings)"""
    gates = {key: tensor for key, tensor in tensors.items() if key.endswith(".attention.gate")}
    known = {f"layers.{i}.attention.gate" for i in range(there)}
    if unexpected := sorted(tensors.keys() - known - {PROMPTS}):
        raise LoraError(
            f"{file}: {', '.join(unexpected[:3])} {'...' if len(unexpected) > 3 else ''} fit nothing in a model of "
            f"{there} layers; {PROMPTS} and layers.N.attention.gate are expected"
        )
    if PROMPTS not in tensors or not gates:
        raise LoraError(f"{file}: has no {PROMPTS if gates else 'layers.N.attention.gate'}; it is no LLaMA-Adapter")
    top = [f"layers.{i}.attention.gate" for i in range(there - len(gates), there)]
    if set(top) != gates.keys():
        raise LoraError(f"{file}: its gates are not those of the topmost {len(gates)} of {there} layers; another base")
    shape = tensors[PROMPTS].shape
    if len(shape) != 2 or shape[0] % len(gates):
        raise LoraError(f"{file}: {PROMPTS} is {tuple(shape)}; (layers * prompts, hidden) for {len(gates)} layers")
    return [gates[key] for key in top], PromptConfig(len(gates), shape[0] // len(gates))


def _fill(file: Path, own: Tensor, values: Tensor, key: str) -> None:
    if values.shape != own.shape:
        raise LoraError(f"{file}: {key} is {tuple(values.shape)}; this model needs {tuple(own.shape)}")
    if not bool(values.isfinite().all()):
        raise LoraError(f"{file}: {key} has values that are NaN or infinite; training has failed")
    own.data = values.to(own.device, own.dtype)
