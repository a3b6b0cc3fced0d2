"""inject: put a new LLaMA-Adapter into a model, in place."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from ..atomic import alone, whole_or_not
from ..config import TOP_LAYERS, PromptConfig, check_name
from ..injection import fresh_parts, install, new_adapter
from ..layers import attentions, tell_fresh
from ..resident import unwrap

ModelT = TypeVar("ModelT", bound=nn.Module)


def inject(
    model: ModelT, layers: int | None = None, prompt_length: int = 10, name: str = "default", *, gate: str = "head",
    train: Sequence[str] = (), features: Sequence[int] | None = None, fusion: str = "late",
) -> ModelT:  # fmt: skip
    """Give the model a new LLaMA-Adapter (arXiv:2303.16199), freeze the base, make the adapter act alone.

    Args:
        model: a decoder whose attention goes through transformers' attention interface; changed in place. Its modules
            stay the same objects, its state-dict keys stay.
        layers: how many attentions have prompts, from the top; None: 30, or all where there are fewer.
        prompt_length: K, the learned prompts of each.
        name: the adapter's name, `[A-Za-z0-9_-]{1,64}`.
        train: names of modules to train whole and save with the adapter, such as a classifier's head.
        features: (tokens, dim) of the features that each row comes with, of pictures or anything else, given by
            `condition`; None: the adapter reads none. What encodes them is a part of the adapter.
        fusion: "late", a projection to one vector a row, added to the prompts of every adapted layer; or "early"
            (arXiv:2304.15010), a small transformer to prompt_length tokens a row, for all layers below those that have
            prompts.
        gate: "head", one for each head, through tanh; or "layer", one for all heads of a layer, without, as PEFT's.

    Returns:
        The same model. Prompts (1, K, hidden), N(0, 1), and gates, zero, are fp32, on the attention's device; a fresh
        adapter changes no bit of the output.

    Raises:
        LoraError: a wrong setting, more layers than there are, a name in use, a merged model, a model whose attention
            cannot be reached. The model is then as it was.
    """
    root = unwrap(model, changing=True)
    with alone():
        check_name(name)
        sizes = None if features is None else list(features)
        config, there = PromptConfig(layers, prompt_length, gate, list(train), sizes, fusion), attentions(root)
        if layers is None:
            below = len(there) // 4 if fusion == "early" else 0  # for the features
            config = replace(config, layers=min(TOP_LAYERS, max(1, len(there) - below)))
        adapter = new_adapter(root, name, config)
        tell_fresh(root, config)
        whole_or_not(root, lambda _: install(root, adapter, fresh_parts(root, {}, adapter.config, False), True))
    return model
