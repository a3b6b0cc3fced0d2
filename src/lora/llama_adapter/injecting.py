"""inject: put a new LLaMA-Adapter into a model, in place."""

from typing import TypeVar

from torch import nn

from ..atomic import alone, whole_or_not
from ..config import PromptConfig, check_name
from ..injection import fresh_parts, install, new_adapter
from ..layers import attentions
from ..resident import unwrap

ModelT = TypeVar("ModelT", bound=nn.Module)
LAYERS = 30  # of LLaMA-7B's 32, as published


def inject(
    model: ModelT, layers: int | None = None, prompt_length: int = 10, name: str = "default", *, gate: str = "head"
) -> ModelT:
    """Give the model a new LLaMA-Adapter (arXiv:2303.16199), freeze the base, make the adapter act alone.

    Args:
        model: a decoder whose attention goes through transformers' attention interface; changed in place. Its modules
            stay the same objects, its state-dict keys stay.
        layers: how many attentions have prompts, from the top; None: 30, or all where there are fewer.
        prompt_length: K, the learned prompts of each.
        name: the adapter's name, `[A-Za-z0-9_-]{1,64}`.
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
        if layers is None:
            layers = min(LAYERS, len(attentions(root)))
        adapter = new_adapter(root, name, PromptConfig(layers, prompt_length, gate))
        whole_or_not(root, lambda _: install(root, adapter, fresh_parts(root, {}, adapter.config, False), True))
    return model
