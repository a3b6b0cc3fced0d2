"""inject: put a new LLaMA-Adapter into a model, in place."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..atomic import alone, whole_or_not
from ..config import TOP_LAYERS, PromptConfig, check_name, matches
from ..errors import LoraError
from ..injection import fresh_parts, install, new_adapter
from ..layers import attentions, base_modules, tell_fresh
from ..resident import unwrap
from ..targets import select

ModelT = TypeVar("ModelT", bound=nn.Module)


def inject(
    model: ModelT, layers: int | None = None, prompt_length: int = 10, name: str = "default", *, gate: str = "head",
    train: Sequence[str] = (), features: Sequence[int] | None = None, fusion: str = "late", train_norms: bool = False,
    train_bias: bool = False,
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
        train_norms, train_bias: as the second version has it (arXiv:2304.15010): train the model's norms, in copies as
            `train` makes them, and a scale and a bias for the output of each linear but the head.
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
        if not isinstance(train_norms, bool):
            raise LoraError(f"train_norms: got {train_norms!r}; True or False")
        given: dict[str, Any] = {"train": _listed(train), "features": _listed(features)}  # checked by the config
        config = PromptConfig(layers, prompt_length, gate, fusion=fusion, train_bias=train_bias, **given)
        there = attentions(root)
        if train_norms:
            config = replace(config, train=[*config.train, *norms(root)])
        if layers is None:
            below = len(there) // 4 if fusion == "early" else 0  # for the features
            config = replace(config, layers=min(TOP_LAYERS, max(1, len(there) - below)))
        adapter = new_adapter(root, name, config)
        tell_fresh(root, config)
        linears = {} if config.matrices is None else select(root, config.matrices)
        whole_or_not(root, lambda _: install(root, adapter, fresh_parts(root, linears, config, False), True))
    return model


def _listed(given: Any) -> Any:
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else given


def norms(root: nn.Module) -> list[str]:
    """The ends of the names of the model's norms; the full names where other modules end so too."""
    modules = {name: module for name, module in base_modules(root) if name}
    parents = {name.rpartition(".")[0] for name in modules}  # by the base's names: a norm may carry adapters already
    found = [n for n, m in modules.items() if "norm" in type(m).__name__.lower() and n not in parents and m._parameters]
    if not found:
        raise LoraError(f"train_norms: {type(root).__name__} has no norm with a weight to train; leave it out")
    short = sorted({name.rpartition(".")[2] for name in found})
    return short if {name for name in modules if matches(short, name)} == set(found) else found
