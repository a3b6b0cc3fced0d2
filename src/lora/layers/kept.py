"""What a generation keeps of the prompts: their keys and values, with the cache of the sequence's own."""

from typing import Any

import torch
from torch import Tensor, nn

Room = dict[str, tuple[Tensor, Tensor, Tensor]]
"""By adapter: the stamp of the prompts that they were made of, keys and values."""


def room(host: nn.Module, cache: Any, queries: int) -> Room | None:
    """Where a layer's are kept, or None where nothing may be: they are made anew in each call.

    They belong to the cache object, so they end with it. A sequence that begins, also in a cache that is used again,
    begins with an empty room, so that nothing is of weights that have changed since.

    Args:
        cache: the call's past_key_values. queries: how many tokens are new.
    """
    layer: Any = getattr(host, "layer_idx", None)
    if cache is None or layer is None or torch.is_grad_enabled() or not hasattr(cache, "get_seq_length"):
        return None
    if not hasattr(cache, "lora_prompts"):
        cache.lora_prompts = {}
    rooms: dict[int, Room] = cache.lora_prompts
    if layer not in rooms or queries > 1 or _begins(cache, layer):
        rooms[layer] = {}
    return rooms[layer]


def _begins(cache: Any, layer: int) -> bool:
    """Whether a layer's cache is empty. A static one has its length on its device, which traced code cannot ask; what
    is traced are the steps after the first."""
    length = cache.get_seq_length(layer)
    if isinstance(length, Tensor):
        return not torch.compiler.is_compiling() and not length.item()
    return bool(length == 0)
