"""Which modules of a model an adapter goes to."""

import re
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

from torch import nn

from .bases import other_quantizer
from .config import LoraConfig, lookup, matches
from .errors import LoraError, LoraWarning, ends, listed, near
from .layers import Kind, base_modules, check_fast_path, kind_of, never_called, no_module, supported
from .layers.host import original_class, unwrapped

ROLES = {word: word[0] for word in ("q", "query", "queries", "k", "key", "keys", "v", "value", "values")}
FUSED = ("c_attn", "W_pack")  # projections of query, key and value in one, whose names do not say so
MORE = {  # what PEFT picks where it picks more than the queries and values, by the config's model_type
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
    "btlm": ["c_proj", "c_attn"],
}
HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier", "qa_outputs")

EntryT = TypeVar("EntryT", str, int)


Choice = Callable[[list[str], list[str]], Collection[str]]
"""(full names of all that can be adapted, of those that "all-linear" means) -> which of the first are meant"""


def select(model: nn.Module, config: LoraConfig, choose: Choice | None = None) -> dict[str, nn.Module]:
    """The modules that the update goes to, by full name, in the model's order.

    `choose`: in the place of the config, which comes from a file, where a name that fits nothing here does no harm.

    Raises:
        LoraError: a target, exclude, layer or pattern that fits nothing, or a target that is no linear map.
    """
    modules = dict(base_modules(model, every_name=True))
    kinds = {name: kind for name, module in modules.items() if name and (kind := kind_of(module)) is not None}
    if not kinds:
        raise LoraError(
            f"model: {type(model).__name__} has no module inside it to adapt; {supported()}{_any_other(modules)}"
        )
    if choose is None:
        _check_targets(model, config.targets, modules, kinds)
        meant = _meant(model, config, modules, kinds)
    else:
        meant = choose(list(kinds), _all_linear(model, kinds)).__contains__
    candidates = [name for name in kinds if meant(name)]
    first_names = {module: name for name, module in base_modules(model)}  # a module shared by two names has one
    chosen = {first_names[modules[name]]: modules[name] for name in candidates if choose or left_in(config, name)}
    if choose is None:
        chosen = _without_unseen(model, config, chosen)
    for name, module in chosen.items():
        check_fast_path(model, name)
        kinds[name].check(model, name, module)
    if choose is not None:
        return chosen
    for name, module in modules.items():  # a linear of another quantizer would be skipped without a word
        linear = name not in kinds and "linear" in type(module).__name__.lower() and not list(module.children())
        if linear and left_in(config, name) and meant(name) and (other := other_quantizer(module)):
            raise LoraError(f"targets: {config.targets!r} fits {name!r} as well; {supported()}{other}, or exclude it")
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


def default_targets(linear: Iterable[str], model_type: str = "", hint: str = "") -> list[str]:
    """The ends of the names of all query and value projections; `hint` ends the error where there is none."""
    names = list(linear)
    if any(matches(MORE.get(model_type), name) for name in names):
        return MORE[model_type]
    attentions: dict[str, dict[str, set[str]]] = {}
    for name in names:
        path = name.split(".")
        own = -2 if path[-1] in ("linear", "layer") and len(path) > 1 else -1  # q_proj.linear, or q_proj
        if roles := _roles(path[own]):
            attentions.setdefault(".".join(path[:own]), {})[name] = roles
    picked = {name for name in names if name.rpartition(".")[2] in FUSED}
    for members in attentions.values():
        if "v" in (roles := set().union(*members.values())) and roles & {"q", "k"}:
            picked |= {name for name in members if members[name] & {"q", "v"}}
    picked = picked or {name for name in names if name.rpartition(".")[2] == "in_proj"}
    if not picked:
        raise LoraError(
            "targets: None picks the query and value projections, and this model has none under a known name; "
            f"name them: targets=[...] or 'all-linear'{near('q_proj', _leaves(names))}{hint}"
        )
    return list(ends((name for name in names if name in picked), names))


def _roles(part: str) -> set[str]:
    """Which projections of an attention a part of a name tells of: of "q_proj" the query's, of "Wqkv" all three."""
    found: set[str] = set()
    for word in part.lower().split("_"):
        word = word if word in ROLES else word.removeprefix("w")
        found |= {ROLES[word]} if word in ROLES else set(word) if re.fullmatch("[qkvz]{2,4}", word) else set()
    return found


def _meant(
    model: nn.Module, config: LoraConfig, modules: dict[str, nn.Module], kinds: dict[str, type[Kind]]
) -> Callable[[str], bool]:
    """Whether `targets` means the module of a name, which a kind takes or none."""
    if config.targets == "all-linear":
        heads = output_heads(model)
        return lambda name: (name not in kinds or kinds[name].all_linear) and not _within(heads, name)
    linear = (name for name, kind in kinds.items() if kind.all_linear)
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    targets = config.targets or default_targets(linear, model_type, _any_other(modules))
    return lambda name: matches(targets, name)


def unseen(model: nn.Module, chosen: dict[str, nn.Module]) -> tuple[list[str], str]:
    """The targets whose parent reads their weight and does not call them: their names, and words for them all."""
    modules = dict(base_modules(model, every_name=True))
    names = [name for name in chosen if never_called(modules, name)]
    readers = dict.fromkeys(original_class(modules[name.rpartition(".")[0]]).__name__ for name in names)
    found = [f"{end} ({count})" for end, count in ends(names, chosen).items()]
    return names, f"{listed(found)} in {listed(list(readers))}, which reads their weight and" if names else ""


def _without_unseen(model: nn.Module, config: LoraConfig, chosen: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The targets without those, which are told of, or refused where they are named."""
    names, words = unseen(model, chosen)
    if names and (config.targets not in (None, "all-linear") or len(names) == len(chosen)):
        raise LoraError(
            f"targets: {words} never calls them, so an adapter there would do nothing, as on {names[0]!r}; leave them "
            f"out with exclude={list(ends(names, chosen))!r}"
        )
    if names:
        warnings.warn(
            f"targets: {config.targets!r} leaves out {words} never calls them: an adapter there would do nothing",
            LoraWarning,
            stacklevel=4,
        )
    return {name: module for name, module in chosen.items() if name not in names}


def left_in(config: LoraConfig, name: str) -> bool:
    """Whether `exclude`, `layers` and `train` leave a module to `targets`."""
    within = config.layers is None or layer_index(name) in _listed(config.layers)
    return within and not matches(config.exclude, name) and not _within(config.train, name)


def _any_other(modules: dict[str, nn.Module]) -> str:
    """The words for the first module that another quantizer made."""
    return next((text for module in modules.values() if (text := other_quantizer(module))), "")


def _all_linear(model: nn.Module, kinds: dict[str, type[Kind]]) -> list[str]:
    heads = output_heads(model)
    return [name for name, kind in kinds.items() if kind.all_linear and not _within(heads, name)]


def output_heads(model: nn.Module) -> list[str]:
    """Full names of the output head: what transformers calls so, and top-level modules of the usual names."""
    heads = [name for name in HEAD_NAMES if name in model._modules]
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None:
        heads += [name for name, module in base_modules(model) if module is unwrapped(head)]
    return list(dict.fromkeys(heads))


def layer_index(name: str) -> int | None:
    """The index of the layer that a module is in: the first number on its path, as in `model.layers.7.mlp`."""
    found = re.search(r"\.(\d+)\.", "." + name)
    return None if found is None else int(found.group(1))


def _listed(one_or_more: EntryT | list[EntryT] | None) -> list[EntryT]:
    return one_or_more if isinstance(one_or_more, list) else [] if one_or_more is None else [one_or_more]


def _within(roots: Iterable[str], name: str) -> bool:
    """Whether a module is one of these (name suffixes), or inside one."""
    return any(re.search(rf"(^|\.){re.escape(root)}(\.|$)", name) for root in roots)


def _check_targets(
    model: nn.Module, targets: str | list[str] | None, modules: dict[str, nn.Module], kinds: dict[str, type[Kind]]
) -> None:
    """Refuse a target that fits no module, or one that no kind takes."""
    if isinstance(targets, str) and targets != "all-linear" and not any(matches(targets, name) for name in kinds):
        raise LoraError(
            f"targets: the regular expression {targets!r} fits no adaptable module's full name "
            f"(it is matched against the whole{near(targets, kinds)}); a list, [{targets!r}], matches the ends"
            f"{_any_other(modules)}"
        )
    for target in targets if isinstance(targets, list) else ():
        fits = [name for name in modules if matches([target], name)]
        if not fits:
            found = no_module(modules, target, _leaves(kinds))
            raise LoraError(f"targets: {target!r} fits no module of {type(model).__name__}{found}")
        for name in fits:
            if name not in kinds:
                inner = _leaves(other for other in kinds if other.startswith(name + "."))
                inside = f"; inside it there are: {', '.join(inner[:8])}" if inner else ""
                raise LoraError(
                    f"targets: {target!r} fits {name!r}, a {type(modules[name]).__qualname__}; {supported()}"
                    f"{other_quantizer(modules[name])}{inside}"
                )


def _check_filters(config: LoraConfig, candidates: list[str], modules: dict[str, nn.Module]) -> None:
    """Refuse an `exclude` or a layer that fits nothing."""
    for entry in _listed(config.exclude):
        pattern = entry if isinstance(config.exclude, str) else [entry]
        if not any(matches(pattern, name) for name in modules):
            raise LoraError(f"exclude: {entry!r} fits no module{no_module(modules, entry, _leaves(candidates))}")
    there = {index for name in candidates if (index := layer_index(name)) is not None}
    for layer in _listed(config.layers):
        if layer not in there:
            span = f"layers {min(there)} to {max(there)}" if there else "no numbered layers"
            raise LoraError(f"layers: no target lies in layer {layer}; the targets lie in {span}")


def _leaves(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
