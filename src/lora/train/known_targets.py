"""Which modules a recipe's targets pick, told from the base's config alone, for architectures whose names are known.

What it refuses `lora.inject` refuses as well, once the base is loaded; minutes earlier. Needs no torch.
"""

from collections.abc import Iterable

from ..config import LoraConfig, lookup, matches
from ..errors import LoraError, near
from .base_facts import BaseFacts

_BESIDE = ("lm_head", "score", "model.embed_tokens")  # what else of such a model can be adapted, as head or as table


def check(config: LoraConfig, facts: BaseFacts) -> None:
    """Raises `LoraError` for targets, exclude, layers or a pattern that fits nothing in a base of these facts.

    Where the names of the base's modules are not known it says nothing.
    """
    linears = facts.linear_names() if facts.whole else []
    if not linears:
        return
    every = [*linears, *_BESIDE]
    kind = f"a {facts.kind} model of {facts.layers} layers"
    picked = _picked(config, linears, every, kind)
    if picked is None:
        return
    _check_layers(config.layers, facts.layers or 0, kind)
    chosen = [name for name in picked if _is_left(config, name)]
    if not chosen:
        raise LoraError(
            f"targets: {config.targets!r} fits {len(picked)} modules of {kind}, but exclude={config.exclude!r}, "
            f"layers={config.layers!r} and train={config.train!r} leave none of them; widen one of these"
        )
    for label, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            if all(lookup({key: 0}, name) is None for name in chosen):
                raise LoraError(f"{label}: {key!r} fits none of the {len(chosen)} targets{near(key, _leaves(chosen))}")


def _picked(config: LoraConfig, linears: list[str], every: list[str], kind: str) -> list[str] | None:
    """The modules that `targets` means; None where a list names one that may be there, of a kind that is not known."""
    targets = config.targets
    if targets == "all-linear":
        return linears
    if targets is None:
        return [name for name in linears if name.endswith(("q_proj", "v_proj"))]
    if isinstance(targets, str):
        picked = [name for name in every if matches(targets, name)]
        if not picked:
            close = near(targets, ["all-linear", *every])
            raise LoraError(
                f"targets: the regular expression {targets!r} fits no adaptable module's full name in {kind} (it is "
                f"matched against the whole, such as {linears[0]!r}{close}); a list, [{targets!r}], matches the ends"
            )
        return picked
    for name in targets:
        if not any(matches([name], each) for each in every) and name.rpartition(".")[2] in _leaves(linears):
            raise LoraError(f"targets: {name!r} fits no module of {kind}{near(name, linears)}")
    unknown = [name for name in targets if not any(matches([name], each) for each in every)]
    return None if unknown else [name for name in every if matches(targets, name)]


def _check_layers(layers: int | list[int] | None, count: int, kind: str) -> None:
    for layer in layers if isinstance(layers, list) else [] if layers is None else [layers]:
        if layer >= count:
            raise LoraError(f"layers: no target lies in layer {layer} of {kind}; they are counted from 0")


def _is_left(config: LoraConfig, name: str) -> bool:
    layers = [config.layers] if isinstance(config.layers, int) else config.layers
    number = next((int(part) for part in name.split(".") if part.isdigit()), None)
    parents = [name[:end] for end in range(len(name) + 1) if end == len(name) or name[end] == "."]
    trained = any(matches(config.train, parent) for parent in parents)
    return (layers is None or number in layers) and not matches(config.exclude, name) and not trained


def _leaves(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
