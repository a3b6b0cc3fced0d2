"""The state of an optimizer or a scheduler as JSON and tensors: what others pickle."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraError
from ..files.tensors import read_tensors, write_tensors

# What JSON has no form for is an object of one of these keys.
_TENSOR, _TUPLE, _PAIRS = "tensor", "tuple", "pairs"


def write_tree(folder: Path, name: str, tree: Any) -> None:
    """Write `name`.json, and `name`.safetensors with the tensors that it speaks of.

    Raises:
        LoraError: something in it is neither a number, a text, a tensor, nor a list, tuple or dict of such.
    """
    tensors: dict[str, Tensor] = {}
    encoded = _encoded(tree, name, tensors)
    (folder / f"{name}.json").write_text(json.dumps(encoded) + "\n", encoding="utf-8")
    write_tensors(folder / f"{name}.safetensors", tensors, {})


def read_tree(folder: Path, name: str) -> Any:
    """What `write_tree` wrote. Raises `LoraError` where it is something else."""
    try:
        encoded = json.loads((folder / f"{name}.json").read_bytes())
        return _decoded(encoded, read_tensors(folder / f"{name}.safetensors"))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise LoraError(f"{folder}: its {name} cannot be read ({error}); take another checkpoint") from error


def _encoded(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        tensors[path] = tree
        return {_TENSOR: path}
    if isinstance(tree, dict):  # keys of an optimizer's state are numbers, which JSON would make texts
        pairs = [[key, _encoded(value, f"{path}.{key}", tensors)] for key, value in tree.items()]
        if not all(isinstance(key, (str, int)) for key in tree):
            raise LoraError(f"optimizer: {path} has keys that are neither texts nor numbers, which cannot be saved")
        return {_PAIRS: pairs}
    if isinstance(tree, (list, tuple)):
        values = [_encoded(value, f"{path}.{index}", tensors) for index, value in enumerate(tree)]
        return {_TUPLE: values} if isinstance(tree, tuple) else values
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise LoraError(f"optimizer: {path} is {type(tree).__name__}, which cannot be saved without pickling it")


def _decoded(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decoded(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == _TENSOR:
        return tensors[content]
    if kind == _TUPLE:
        return tuple(_decoded(value, tensors) for value in content)
    if kind != _PAIRS:
        raise ValueError(f"{kind!r} is no form of a value")
    return {key: _decoded(value, tensors) for key, value in content}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state; what the optimizer keeps in pages, which its own loading makes plain tensors, is paged again.

    Raises:
        LoraError: it is of other parameters or of another optimizer.
    """
    try:
        optimizer.load_state_dict(state)
    except (ValueError, LookupError, TypeError) as error:
        raise LoraError(f"resume: the optimizer's state does not fit ({error}); was the run the same?") from error
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # under accelerate's wrapper
    if not getattr(inner, "is_paged", False):
        return
    for parameter, values in inner.state.items():
        for key in [key for key, value in values.items() if key.startswith("state") and isinstance(value, Tensor)]:
            page = inner.get_state_buffer(parameter, dtype=values[key].dtype)
            page.copy_(values[key])
            values[key] = page
