"""Which modules of a model an adapter goes to."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .bases import keeps_forward, other_quantizer, supported, weight_of
from .config import LoraConfig, lookup, matches
from .errors import LoraError, near
from .layers.host import adapters_of, base_modules, original_class

ATTENTION_NAMES = (
    ["q_proj", "v_proj"],  # Llama, Mistral, Qwen, Gemma, OPT, BART, CLIP, ...
    ["query", "value"],  # BERT, RoBERTa, ViT, ...
    ["q_lin", "v_lin"],  # DistilBERT
    ["to_q", "to_v"],  # diffusion models
    ["SelfAttention.q", "SelfAttention.v"],  # T5
    ["query_key_value"],  # GPT-NeoX, BLOOM, Falcon
    ["qkv_proj"],  # Phi-3, ...
    ["c_attn"],  # GPT-2
    ["Wqkv"],  # ModernBERT, MPT
    ["in_proj"],
    ["qkv"],
)
HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier", "qa_outputs")


def select(model: nn.Module, config: LoraConfig, loading: bool = False) -> dict[str, nn.Module]:
    """The modules that the update goes to, by full name, in the model's order.

    `loading`: the config comes from a file, where a name that fits nothing here does no harm: the tensors decide.

    Raises:
        LoraError: a target, exclude, layer or pattern that fits nothing, or a target that is no linear map.
    """
    modules = dict(base_modules(model, every_name=True))
    linear = {name: module for name, module in modules.items() if name and weight_of(module) is not None}
    if not linear:
        raise LoraError(
            f"model: {type(model).__name__} has no linear inside it to adapt; {supported()}{_any_other(modules)}"
        )
    candidates = _matching(model, config, modules, linear, loading)
    first_names = {module: name for name, module in base_modules(model)}  # a module shared by two names has one
    chosen = {
        first_names[linear[name]]: linear[name]
        for name in candidates
        if not matches(config.exclude, name) and _in_layers(config.layers, name) and not _within(config.train, name)
    }
    for name, module in chosen.items():
        check_linear(model, name, module)
    if loading:
        return chosen
    _check_skipped(model, config, modules, linear)
    _check_filters(config, candidates, modules)
    if not chosen:
        raise LoraError(
            f"targets: {config.targets!r} fits {len(candidates)} modules, but exclude={config.exclude!r}, "
            f"layers={config.layers!r} and train={config.train!r} leave none of them; widen one of these"
            f"{'' if candidates else _any_other(modules)}"
        )
    for label, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            if all(lookup({key: 0}, name) is None for name in chosen):
                raise LoraError(f"{label}: {key!r} fits none of the {len(chosen)} targets{near(key, _leaves(chosen))}")
    return chosen


def default_targets(linear: Iterable[str], hint: str = "") -> list[str]:
    """The first of the known pairs of attention names whose members all exist; `hint` ends the error if none does."""
    names = list(linear)
    for group in ATTENTION_NAMES:
        if all(any(matches([target], name) for name in names) for target in group):
            return group
    raise LoraError(
        "targets: None picks the query and value projections, and this model has none under a known name; "
        f"name them: targets=[...] or 'all-linear'{near('q_proj', _leaves(names))}{hint}"
    )


def check_called(model: nn.Module, argument: str, name: str) -> None:
    """Refuse a module whose parent reads its weight instead of calling it: an adapter there would do nothing."""
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


def check_linear(model: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse a linear whose own forward would not be what the library takes it for, or would never be called."""
    check_called(model, "targets", name)
    kind: Any = original_class(module) if (own := adapters_of(module)) is None else own.original
    if not keeps_forward(kind):
        raise LoraError(
            f"targets: {name!r} is a {kind.__module__}.{kind.__qualname__}, which has a forward of its own; "
            f"{supported()}, and subclasses that keep their forward{other_quantizer(module)}"
        )
    frozen = weight_of(module)
    assert frozen is not None
    plain = frozen.quantization is None
    weight: Any = module._parameters.get("weight")
    if plain and weight is None:
        raise LoraError(
            f"targets: the weight of {name!r} is computed from other parameters (weight_norm, a parametrization), so "
            "nothing can be merged into it; torch.nn.utils.parametrize.remove_parametrizations makes it a plain one"
        )
    if plain and is_lazy(weight):
        raise LoraError(f"targets: {name!r} is lazy and has no shape yet; run the model once, then inject")
    if other := other_quantizer(module):
        raise LoraError(f"targets: {name!r} cannot be adapted; {supported()}{other}")
    frozen.check()
    if plain and (not weight.is_floating_point() or weight.element_size() < 2):
        raise LoraError(f"targets: the weight of {name!r} is {weight.dtype}; supported are floats of 16 bits or more")
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise LoraError(
            f"targets: {name!r} has had its forward replaced on the instance, and an adapter would be passed by; "
            "inject before whatever replaces it"
        )


def _check_skipped(
    model: nn.Module, config: LoraConfig, modules: dict[str, nn.Module], linear: dict[str, nn.Module]
) -> None:
    """Refuse a linear that targets means and that another quantizer made, which would be skipped without a word."""
    heads = output_heads(model)
    for name, module in modules.items():
        if name in linear or next(module.children(), None) is not None or "linear" not in type(module).__name__.lower():
            continue
        if matches(config.exclude, name) or not _in_layers(config.layers, name) or _within(config.train, name):
            continue
        if config.targets == "all-linear":
            meant = not _within(heads, name)
        else:
            meant = matches(config.targets or default_targets(linear), name)
        if meant and (other := other_quantizer(module)):
            raise LoraError(f"targets: {config.targets!r} fits {name!r} as well; {supported()}{other}, or exclude it")


def _any_other(modules: dict[str, nn.Module]) -> str:
    """The words for the first module that another quantizer made."""
    return next((text for module in modules.values() if (text := other_quantizer(module))), "")


def _matching(
    model: nn.Module,
    config: LoraConfig,
    modules: dict[str, nn.Module],
    linear: dict[str, nn.Module],
    loading: bool,
) -> list[str]:
    targets = config.targets
    if targets == "all-linear":
        heads = output_heads(model)
        return [name for name in linear if not _within(heads, name)]
    if isinstance(targets, str):
        found = [name for name in linear if matches(targets, name)]
        if not found and not loading:
            raise LoraError(
                f"targets: the regular expression {targets!r} fits no linear module's full name "
                f"(it is matched against the whole{near(targets, linear)}); a list, [{targets!r}], matches the ends"
                f"{_any_other(modules)}"
            )
        return found
    for target in [] if loading else targets or []:
        fits = [name for name in modules if matches([target], name)]
        if not fits:
            raise LoraError(
                f"targets: {target!r} fits no module of {type(model).__name__}{near(target, _leaves(linear))}"
            )
        for name in fits:
            if name not in linear:
                kind = type(modules[name])
                raise LoraError(
                    f"targets: {target!r} fits {name!r}, a {kind.__qualname__}; {supported()}"
                    f"{other_quantizer(modules[name])}{_inside(name, linear)}"
                )
    return [name for name in linear if matches(targets or default_targets(linear, _any_other(modules)), name)]


def output_heads(model: nn.Module) -> list[str]:
    """Full names of the output head: what transformers calls so, and top-level modules of the usual names."""
    heads = [name for name in HEAD_NAMES if name in model._modules]
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None:
        heads += [name for name, module in base_modules(model) if module is head]
    return list(dict.fromkeys(heads))


def layer_index(name: str) -> int | None:
    """The index of the layer that a module is in: the first number on its path, as in `model.layers.7.mlp`."""
    found = re.search(r"\.(\d+)\.", "." + name)
    return None if found is None else int(found.group(1))


def _in_layers(layers: int | list[int] | None, name: str) -> bool:
    if layers is None:
        return True
    return layer_index(name) in (layers if isinstance(layers, list) else [layers])


def _within(roots: Iterable[str], name: str) -> bool:
    """Whether a module is one of these (name suffixes), or inside one."""
    return any(re.search(rf"(^|\.){re.escape(root)}(\.|$)", name) for root in roots)


def _check_filters(config: LoraConfig, candidates: list[str], modules: dict[str, nn.Module]) -> None:
    if config.exclude is not None:
        entries = [config.exclude] if isinstance(config.exclude, str) else [[entry] for entry in config.exclude]
        for entry in entries:
            if not any(matches(entry, name) for name in modules):
                shown = entry if isinstance(entry, str) else entry[0]
                raise LoraError(f"exclude: {shown!r} fits no module{near(shown, _leaves(candidates))}")
    if config.layers is not None:
        there = {layer_index(name) for name in candidates} - {None}
        for index in config.layers if isinstance(config.layers, list) else [config.layers]:
            if index not in there:
                span = f"layers {min(there)} to {max(there)}" if there else "no numbered layers"  # type: ignore[type-var]
                raise LoraError(f"layers: no target lies in layer {index}; the targets lie in {span}")


def _leaves(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _inside(name: str, linear: Iterable[str]) -> str:
    inner = _leaves(other for other in linear if other.startswith(name + "."))
    return f"; inside it there are: {', '.join(inner[:8])}" if inner else ""
