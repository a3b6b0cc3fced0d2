"""The base with a fresh adapter, ready to train, and how its rows become a batch."""

from collections.abc import Callable
from typing import Any

import lora

from ..data.collate import PaddingCollator
from ..errors import LoraError
from .base import load_base, pick_dtype
from .classify import LabelCollator, load_classifier, pad_id, with_head
from .feed import Item
from .leaks import collator_for
from .methods import put
from .needs import check_liger
from .recipe import Recipe
from .rows import RunRows

Collate = Callable[[list[Item]], dict[str, Any]]


def adapted(recipe: Recipe, names: list[str] | None = None, tokenizer: Any = None) -> Any:
    """Load, adapt and prepare, as the recipe says; with `names`, a classifier of these labels.

    Raises:
        LoraError: the model cannot be loaded, or does not take what the recipe asks for.
    """
    model, config = fresh_base(recipe, names, tokenizer), recipe.adapter()
    put(with_head(config, model) if names else config, model)
    if recipe.liger:
        check_liger(model)
    if recipe.offload and not getattr(model, "is_quantized", False):
        model.to("cuda")  # where Trainer would take it; prepare wants to see the GPU
    lora.prepare(model, checkpointing="offload" if recipe.offload else recipe.gradient_checkpointing)
    if recipe.packing and names:
        raise LoraError("packing: a classifier reads a label from each row, and packs would join them; leave it out")
    return model


def fresh_base(recipe: Recipe, names: list[str] | None = None, tokenizer: Any = None) -> Any:
    """The recipe's base as it is loaded, with no adapter; with `names`, a classifier of these labels."""
    dtype = pick_dtype(recipe.dtype)
    if names:
        return load_classifier(recipe.model, names, tokenizer, dtype, recipe.quantize)
    return load_base(recipe.model, dtype, recipe.quantize)


def collator(recipe: Recipe, model: Any, rows: RunRows) -> Collate:
    """What makes a batch of a list of items."""
    if rows.template is None:
        return LabelCollator(pad_id(model, rows.tokenizer))
    pad = rows.tokenizer.pad_token_id or 0  # the padding is masked, so its id does not matter; 0 is in every vocabulary
    return collator_for(model, pad) if recipe.packing else PaddingCollator(pad)
