"""What the user asks of one adapter: plain values, all errors told at once."""

# ruff: noqa: RUF009  (a setting is a field with its metadata, made by a function of ours)
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

from .errors import LoraError, near

Check = Callable[[str, Any], Iterable[str]]
"""(label, value) -> what is wrong with the value"""


def matches(pattern: str | Iterable[str] | None, name: str) -> bool:
    """Whether a module's full name fits: a list of name suffixes, or one regular expression for the whole."""
    if pattern is None:
        return False
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == suffix or name.endswith("." + suffix) for suffix in pattern)


def lookup(patterns: Mapping[str, Any], name: str, otherwise: Any = None) -> Any:
    """What a rank or alpha pattern has under the first key (a regular expression) that fits the end of a full name."""
    return next((value for key, value in patterns.items() if _ending(key).match(name)), otherwise)


@lru_cache(1 << 14)  # an adapter may have a pattern for each module, and re keeps 512
def _ending(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def scaling(module: str, alpha: float, alpha_pattern: Mapping[str, float], r: int, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) with rslora, for one module, by full name."""
    found: float = lookup(alpha_pattern, module, alpha)
    return found / (math.sqrt(r) if rslora else r)


@dataclass(frozen=True)
class Setting:
    """All that is known of one field of `LoraConfig` beside its type."""

    default: Any
    help: str  # the text of its flag in `lora train --help`
    check: Check
    peft: str  # its key in adapter_config.json
    maths: int = 0  # its place in the digest of what gives the tensors their meaning; 0 where it tells how to train
    choices: tuple[str, ...] = ()  # the values that it may have, where they are few


def _setting(default: Any, help: str, check: Check | tuple[str, ...], peft: str, maths: int = 0) -> Any:
    """A field of `LoraConfig`; a tuple for `check` has the allowed values."""
    choices = check if isinstance(check, tuple) else ()
    if isinstance(check, tuple):
        check = _unless(lambda value: value in choices, f"one of {', '.join(choices)}")
    start: Any = {"default_factory": type(default)} if isinstance(default, (dict, list)) else {"default": default}
    return field(**start, metadata={"setting": Setting(default, help, check, peft, maths, choices)})


def _unless(fits: Callable[[Any], bool], allowed: str) -> Check:
    def check(label: str, value: Any) -> Iterable[str]:
        if not fits(value):
            yield f"{label}: got {value!r}; {allowed}"

    return check


def _pattern(fits: Callable[[Any], bool], allowed: str) -> Check:
    def check(label: str, patterns: Any) -> Iterable[str]:
        if not isinstance(patterns, dict):
            yield f"{label}: got {patterns!r}; a dict from module name to value"
            return
        for key, value in patterns.items():
            yield from _unless(fits, f"values are {allowed}")(f"{label}[{key!r}]", value)
            yield from _bad_regex(f"{label} key", key)

    return check


def _bad_names(label: str, value: Any) -> Iterable[str]:
    if isinstance(value, str) and value:
        yield from _bad_regex(label, value)
    elif value is not None and not (_is_names(value) and value):
        yield f"{label}: got {value!r}; a list of module names such as ['q_proj', 'v_proj'], or a regular expression"


def _bad_regex(label: str, value: Any) -> Iterable[str]:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        yield f"{label}: got {value!r}, which is no regular expression ({error})"


def _is_number(value: Any, low: float, kind: Any = (int, float)) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return (isinstance(value, int) or math.isfinite(value)) and value > low  # an integer may be beyond any float


def _is_rank(value: Any) -> bool:
    return _is_number(value, 0, int)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _are_layers(value: Any) -> bool:
    indices = value if isinstance(value, list) else [value]
    return value is None or (value != [] and all(_is_number(index, -1, int) for index in indices))


class AdapterConfig:
    """What the settings of every adapter say: which modules it trains whole, and which biases."""

    train: list[str]
    bias: str

    @property
    def matrices(self) -> "LoraConfig | None":
        """What it has on linears and other matrices; None: nothing."""
        return self if isinstance(self, LoraConfig) else None


TOP_LAYERS = 30  # of a LLaMA-Adapter where nobody says how many: of LLaMA-7B's 32, as published


@dataclass(frozen=True)
class PromptConfig(AdapterConfig):
    """The settings of a LLaMA-Adapter (arXiv:2303.16199).

    Args:
        layers, prompt_length: how many attentions, from the top (None: 30, or all of fewer); learned prompts in each.
        gate: one for each "head", through tanh, as published; or one for each "layer", without, as PEFT has it.
        train: names of modules to train whole and save with the adapter.
        features: [tokens, dim] of the features that each row of a batch comes with; None: the adapter reads none.
        fusion: "late", a vector a row added to the prompts; "early", tokens in all layers below (arXiv:2304.15010).
        train_bias: a scale and a bias for the output of each linear but the head (arXiv:2304.15010).

    Raises:
        LoraError: with every field that is wrong.
    """

    layers: int | None = None
    prompt_length: int = 10
    gate: str = "head"
    train: list[str] = field(default_factory=list)
    features: list[int] | None = None
    fusion: str = "late"
    train_bias: bool = False
    bias = "none"  # of all such adapters: no field

    def __post_init__(self) -> None:
        sizes, whole = self.features, "a whole number of at least 1"
        pair = isinstance(sizes, list) and len(sizes) == 2 and all(map(_is_rank, sizes))
        fits = {
            "layers": (self.layers is None or _is_rank(self.layers), whole),
            "prompt_length": (_is_rank(self.prompt_length), whole),
            "train": (_is_names(self.train), "a list of module names, such as ['score']"),
            "gate": (self.gate in ("head", "layer"), "'head' or 'layer'"),
            "features": (sizes is None or pair, "[tokens, dim] of the features of one row, or None"),
            "fusion": (self.fusion in ("late", "early")[: 1 + pair], "'late'; or 'early' beside features"),
            "train_bias": (isinstance(self.train_bias, bool), "True or False"),
        }
        if wrong := {name: allowed for name, (fit, allowed) in fits.items() if not fit}:
            raise LoraError("\n".join(f"{name}: got {getattr(self, name)!r}; {wrong[name]}" for name in wrong))

    @property
    def matrices(self) -> "LoraConfig | None":
        return LoraConfig(r=1, targets="all-linear", train=self.train, update="affine") if self.train_bias else None


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """One adapter's settings; the keywords of `lora.inject`.

    Args:
        r: rank, at least 1.
        targets: name suffixes, one regular expression for the full name, `"all-linear"` (every linear but
            the output head), or None (the query and value projections, whatever the model calls them).
        alpha: numerator of the scaling; None means 2 r.
        dropout: probability with which an element of the update's input is zeroed in training, 0 <= p < 1.
        bias: which biases train: "none", "lora_only" (of the targets) or "all".
        init: A starts "gaussian", N(0, 1/r) by standard deviation, or "kaiming", as nn.Linear; B at zero. Of an
            embedding A is at zero and B N(0, 1), whichever is given.
        rslora: scale by alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732).
        exclude: names to leave out, as suffixes or one regular expression.
        layers: indices of the layers to adapt; None means all.
        rank_pattern, alpha_pattern: r or alpha of the modules whose name ends with the key (a regular expression).
        train: names of modules to train whole and save with the adapter.
        update: what each target holds: "lora", "dora", or the name of an update that was registered.
        dora: short for update="dora" (arXiv:2402.09353).

    Raises:
        LoraError: with every field that is wrong.
    """

    r: int = _setting(
        8, "Rank of the update.",
        _unless(_is_rank, "the rank is a whole number of at least 1, such as 8, 16 or 64"), peft="r", maths=1,
    )  # fmt: skip
    targets: str | list[str] | None = _setting(
        None, "Layers to adapt: all-linear, name suffixes (q_proj,v_proj), or a regular expression "
        "[default: the query and value projections].", _bad_names, peft="target_modules", maths=7,
    )  # fmt: skip
    alpha: float | None = _setting(
        None, "Scale: the update is multiplied by alpha / r [default: 2 * r].",
        _unless(lambda value: value is None or _is_number(value, 0), "a finite number above 0, or None for 2 * r"),
        peft="lora_alpha", maths=2,
    )  # fmt: skip
    dropout: float = _setting(
        0.0, "Dropout on the input of A.",
        _unless(lambda p: _is_number(p, -1) and 0 <= p < 1, "a probability from 0 up to, but not including, 1"),
        peft="lora_dropout",
    )  # fmt: skip
    bias: str = _setting(
        "none", "Which biases are trained as well.", ("none", "all", "lora_only"), peft="bias", maths=4
    )
    init: str = _setting(
        "gaussian", "How A starts; B starts at zero (of an embedding A does, and B is N(0, 1)).",
        ("gaussian", "kaiming"), peft="init_lora_weights",
    )  # fmt: skip
    rslora: bool = _setting(
        False, "Scale by alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732).",
        _unless(lambda value: isinstance(value, bool), "True or False"), peft="use_rslora", maths=3,
    )  # fmt: skip
    exclude: str | list[str] | None = _setting(
        None, "Layers to leave out: name suffixes, or a regular expression.", _bad_names, peft="exclude_modules"
    )
    layers: int | list[int] | None = _setting(
        None, "Indices of the layers to adapt, such as 0,1 [default: all].",
        _unless(_are_layers, "one index, a list of indices counted from 0, or None for all"),
        peft="layers_to_transform",
    )  # fmt: skip
    rank_pattern: dict[str, int] = _setting(
        {}, "Ranks of some targets, by the end of their name: down_proj=16,layers.0.self_attn.q_proj=4.",
        _pattern(_is_rank, "whole numbers of at least 1"), peft="rank_pattern", maths=5,
    )  # fmt: skip
    alpha_pattern: dict[str, float] = _setting(
        {}, "Alphas of some targets, written like rank_pattern.",
        _pattern(lambda value: _is_number(value, 0), "finite numbers above 0"), peft="alpha_pattern", maths=6,
    )  # fmt: skip
    train: list[str] = _setting(
        [], "Modules trained whole and saved with the adapter.",
        _unless(_is_names, "a list of module names, such as ['score']"), peft="modules_to_save", maths=8,
    )  # fmt: skip
    update: str | None = _setting(
        None, "What each target holds: lora, dora, or an update that was registered [default: lora].",
        _unless(lambda n: n is None or (isinstance(n, str) and n != ""), "an update's name, or None for 'lora'"),
        peft="lora_update", maths=10,
    )  # fmt: skip
    dora: bool | None = _setting(
        None, "Short for update=dora (arXiv:2402.09353).",
        _unless(lambda value: value is None or isinstance(value, bool), "True or False"), peft="use_dora", maths=9,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "layers", "train"):  # tuples and sets are as good as lists
            value = getattr(self, name)
            if isinstance(value, (tuple, set, frozenset)):
                object.__setattr__(self, name, list(value) if isinstance(value, tuple) else sorted(value))
        wrong = [text for name, setting in SETTINGS.items() for text in setting.check(name, getattr(self, name))]
        if None not in (self.dora, self.update) and self.dora != (self.update == "dora"):
            wrong.append(f"dora: got {self.dora!r} beside update={self.update!r}; leave one of the two out")
        if wrong:
            raise LoraError("\n".join(wrong))
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2 * self.r)
        object.__setattr__(self, "update", self.update or ("dora" if self.dora else "lora"))
        object.__setattr__(self, "dora", self.update == "dora")

    def rank(self, module: str) -> int:
        """The rank of the update of one module, by full name."""
        return int(lookup(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """The factor s of the update of one module, by full name."""
        assert self.alpha is not None
        return scaling(module, self.alpha, self.alpha_pattern, self.rank(module), self.rslora)

    @classmethod
    def of(cls, **keywords: Any) -> "LoraConfig":
        """LoraConfig(**keywords), with near names for a keyword that does not exist."""
        for key in keywords:
            if key not in SETTINGS:
                raise LoraError(f"{key}: no such argument{near(key, SETTINGS)}")
        return cls(**keywords)


SETTINGS: dict[str, Setting] = {f.name: f.metadata["setting"] for f in fields(LoraConfig)}


def check_name(name: str) -> str:
    """An adapter's name is a part of keys and paths: letters, digits, _ and - only."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise LoraError(f"name: got {name!r}; an adapter's name has 1 to 64 letters, digits, '_' or '-', and no path")
    return name
