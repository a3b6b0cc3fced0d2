"""Modules whose parent reads their weight and never calls them: an adapter there would do nothing."""

import torch
from torch import nn

from ..errors import LoraError


def check_called(model: nn.Module, argument: str, name: str) -> None:
    """Refuse a module whose parent reads its weight instead of calling it."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise LoraError(
            f"{argument}: {name!r} is inside nn.MultiheadAttention, which reads its weight and never calls it, so an "
            "adapter there would do nothing; leave it out with exclude=[...]"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise LoraError(
            f"{argument}: {name!r} is inside nn.TransformerEncoderLayer, whose fast path reads its weight and does not "
            "call it in eval mode; call torch.backends.mha.set_fastpath_enabled(False) first"
        )
