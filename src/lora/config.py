"""What the user asks of one adapter: plain values, all errors told at once."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import LoraError, near

BIAS_MODES = ("none", "all", "lora_only")
INITS = ("gaussian", "kaiming")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def matches(pattern: str | Iterable[str] | None, name: str) -> bool:
    """Whether a module's full name fits: a list of name suffixes, or one regular expression for the whole."""
    if pattern is None:
        return False
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == suffix or name.endswith("." + suffix) for suffix in pattern)


def lookup(patterns: Mapping[str, Any], name: str) -> str | None:
    """The first key of a rank or alpha pattern that fits the end of a module's full name (a regular expression)."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


@dataclass(frozen=True)
class LoraConfig:
    """One adapter's settings; the keywords of `lora.inject`.

    Args:
        r: rank, at least 1.
        targets: name suffixes, one regular expression for the full name, `"all-linear"` (every linear but
            the output head), or None (the query and value projections, whatever the model calls them).
        alpha: numerator of the scaling; None means 2 r.
        dropout: probability with which an element of the update's input is zeroed in training, 0 <= p < 1.
        bias: which biases train: "none", "lora_only" (of the targets) or "all".
        init: A starts "gaussian", N(0, 1/r) by standard deviation, or "kaiming", as nn.Linear; B at zero.
        rslora: scale by alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732).
        exclude: names to leave out, as suffixes or one regular expression.
        layers: indices of the layers to adapt; None means all.
        rank_pattern, alpha_pattern: r or alpha of the modules whose name ends with the key (a regular expression).
        train: names of modules to train whole and save with the adapter.

    Raises:
        LoraError: with every field that is wrong.
    """

    r: int = 8
    targets: str | list[str] | None = None
    alpha: float | None = None
    dropout: float = 0.0
    bias: str = "none"
    init: str = "gaussian"
    rslora: bool = False
    exclude: str | list[str] | None = None
    layers: int | list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    train: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "layers", "train"):  # tuples and sets are as good as lists
            value = getattr(self, name)
            if isinstance(value, (tuple, set, frozenset)):
                object.__setattr__(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        wrong = list(_complaints(self))
        if wrong:
            raise LoraError("\n".join(wrong))
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2 * self.r)

    def rank(self, module: str) -> int:
        """The rank of the update of one module, by full name."""
        key = lookup(self.rank_pattern, module)
        return self.r if key is None else self.rank_pattern[key]

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora, for one module, by full name."""
        key = lookup(self.alpha_pattern, module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        assert alpha is not None
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    @classmethod
    def of(cls, **keywords: Any) -> "LoraConfig":
        """LoraConfig(**keywords), with near names for a keyword that does not exist."""
        known = [f.name for f in fields(cls)]
        for key in keywords:
            if key not in known:
                raise LoraError(f"{key}: no such argument{near(key, known)}")
        return cls(**keywords)


def check_name(name: str) -> str:
    """An adapter's name is a part of keys and paths: letters, digits, _ and - only."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise LoraError(
            f"name: got {name!r}; an adapter's name has 1 to 64 letters, digits, '_' or '-' and no path in it"
        )
    return name


def _is_number(value: Any, low: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > low


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _complaints(c: LoraConfig) -> Iterable[str]:
    if not _is_rank(c.r):
        yield f"r: got {c.r!r}; the rank is a whole number of at least 1, such as 8, 16 or 64"
    if c.alpha is not None and not _is_number(c.alpha, 0):
        yield f"alpha: got {c.alpha!r}; a finite number above 0, or None for 2 * r"
    if not (_is_number(c.dropout, -1) and 0 <= c.dropout < 1):
        yield f"dropout: got {c.dropout!r}; a probability from 0 up to, but not including, 1"
    if c.bias not in BIAS_MODES:
        yield f"bias: got {c.bias!r}; one of {', '.join(BIAS_MODES)}"
    if c.init not in INITS:
        yield f"init: got {c.init!r}; one of {', '.join(INITS)}"
    if not isinstance(c.rslora, bool):
        yield f"rslora: got {c.rslora!r}; True or False"
    yield from _bad_names("targets", c.targets)
    yield from _bad_names("exclude", c.exclude)
    if not isinstance(c.train, list) or not all(isinstance(n, str) and n for n in c.train):
        yield f"train: got {c.train!r}; a list of module names, such as ['score']"
    layers = [] if c.layers is None else c.layers if isinstance(c.layers, list) else [c.layers]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers) or c.layers == []:
        yield f"layers: got {c.layers!r}; one index, a list of indices counted from 0, or None for all"
    for label, patterns, fits, allowed in (
        ("rank_pattern", c.rank_pattern, _is_rank, "whole numbers of at least 1"),
        ("alpha_pattern", c.alpha_pattern, lambda v: _is_number(v, 0), "finite numbers above 0"),
    ):
        if not isinstance(patterns, dict):
            yield f"{label}: got {patterns!r}; a dict from module name to value"
            continue
        for key, value in patterns.items():
            if not fits(value):
                yield f"{label}[{key!r}]: got {value!r}; values are {allowed}"
            yield from _bad_regex(f"{label} key", key)


def _bad_names(label: str, value: Any) -> Iterable[str]:
    if value is None:
        return
    if isinstance(value, str):
        if not value:
            yield f"{label}: got ''; a regular expression, a list of module names, or None"
        else:
            yield from _bad_regex(label, value)
    elif not isinstance(value, list) or not value or not all(isinstance(n, str) and n for n in value):
        yield f"{label}: got {value!r}; a list of module names such as ['q_proj', 'v_proj'], or a regular expression"


def _bad_regex(label: str, value: Any) -> Iterable[str]:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        yield f"{label}: got {value!r}, which is no regular expression ({error})"
