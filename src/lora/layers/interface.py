"""How an attention module's own forward is given more to attend to, without a copy of its code.

Models of transformers look up who computes their attention by a name in their config, and hand that function the
queries, keys and values. A module that carries prompts sees a config that gives the name of the function here, which
calls the one that the config really names and adds the prompts' part. The model's own config, and so its masks, stay.
"""

import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LoraError
from ..ops import add_prompt_attention
from .host import original_class

NAME = "lora_prompts"


class Prompted(NamedTuple):
    """What one adapter has a call attend to: keys, values (batch or 1, key_heads, K, dim), factors (batch or 1, heads),
    and a mask (batch, K) or None; see `add_prompt_attention`."""

    keys: Tensor
    values: Tensor
    factors: Tensor
    mask: Tensor | None = None


class Seen:
    """The config as a host sees it: the real one, with our function's name."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self._real = config

    def __getattr__(self, name: str) -> Any:
        if name == "_real":  # while it is being copied
            raise AttributeError(name)
        return getattr(self._real, name)


class Unchanged:
    """A host as the function that its config names should see it."""

    def __init__(self, host: nn.Module) -> None:
        self._host = host
        self.config = host.__dict__["config"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


class _Enough(Exception):
    """Ends a forward that is asked for its keys and values alone."""


def prompted_attention(
    host: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any,
    lora_prompts: tuple[Prompted, ...] | list[Tensor] | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The attention of a host: what its config names, plus the prompts' part.

    Args:
        query: (batch, heads, queries, dim). key, value: (batch, key_heads, keys, dim).
        lora_prompts: what to add; or a list, which takes the key and the value, and nothing is attended to.

    Returns:
        (batch, queries, heads, dim), and the weights of the model's own attention, where it gives them.
    """
    if lora_prompts is None:
        raise LoraError(
            f"model: {type(host).__name__} does not hand its keywords on to the attention function, so no prompts "
            "reach it; lora.remove the adapter"
        )
    if isinstance(lora_prompts, list):
        lora_prompts += [key, value]
        if not torch.compiler.is_compiling():  # which leaves out what nobody reads
            raise _Enough
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    output, weights = named(host)(Unchanged(host), query, key, value, attention_mask, *args, **kwargs)
    for prompts in lora_prompts:
        if prompts.factors.shape[1] != query.shape[1]:
            raise LoraError(
                f"model: {type(host).__name__} attends with {query.shape[1]} heads, and the adapter has "
                f"{prompts.factors.shape[1]} gates; its config does not say how many there are"
            )
        scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
        output = add_prompt_attention(
            output, query, prompts.keys, prompts.values, prompts.factors,
            scaling=scaling, softcap=softcap, mask=prompts.mask,
        )  # fmt: skip
    return output, weights


def named(host: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that a host's real config names."""
    interface: Any = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    own: Any = host._modules["lora"]
    name = host.__dict__["config"]._attn_implementation
    if name in own.way.branches:
        raise LoraError(branches(host, name))
    found: Callable[..., Any] = interface.get_interface(name, own.way.eager)
    return found


def branches(host: nn.Module, name: str) -> str:
    """The words for a class that takes a way of its own where its config names this function."""
    return (
        f"model: {original_class(host).__name__} takes a way of its own where the attention is {name!r}, which prompts "
        "would pass by; load the model with another attn_implementation"
    )


def announce() -> None:
    """Make the name known to transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, prompted_attention)


def forward_of(cls: type[nn.Module]) -> Any:
    """The forward of a class, without what was put around it."""
    return inspect.unwrap(cls.forward)


class Way(NamedTuple):
    """What is known of a class's forward. Read once: traced code would not.

    names: what it takes, by name. eager: the attention in plain torch that stands in its file, which transformers
    takes for "eager". branches: the names of attention functions for which it may do something else.
    """

    names: tuple[str, ...]
    eager: Any
    branches: frozenset[str]

    @classmethod
    def of(cls, kind: type[nn.Module]) -> "Way":
        forward = forward_of(kind)
        eager = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
        names = tuple(inspect.signature(forward).parameters)[1:]
        texts = {c for const in forward.__code__.co_consts for c in (const if isinstance(const, tuple) else (const,))}
        others = {"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"}
        return cls(names, forward.__globals__[eager[0]] if eager else None, frozenset(texts & others))

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a call gives, by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


def goes_through(cls: type[nn.Module]) -> bool:
    """Whether a class looks up its attention by the name in its own config."""
    code = getattr(forward_of(cls), "__code__", None)
    return code is not None and {"ALL_ATTENTION_FUNCTIONS", "config", "_attn_implementation"} <= {*code.co_names}


# What an attention may be given: of the first four there is a neutral value, the others can be left out.
KNOWN = {"position_embeddings", "position_ids", "attention_mask", "past_key_values"} | {
    "output_attentions", "use_cache", "cache_position", "layer_past", "encoder_hidden_states",
    "encoder_attention_mask", "key_value_states",
}  # fmt: skip


def why_not(cls: type[nn.Module]) -> str:
    """What keeps a class that goes through the interface from carrying prompts; "" for nothing."""
    _, *parameters = [*inspect.signature(forward_of(cls)).parameters.values()][1:]
    if more := [p.name for p in parameters if p.kind < p.VAR_POSITIONAL and p.name not in KNOWN]:
        return f"what it makes of its keys and values may depend on {', '.join(more)}, which prompts do not have"
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return "it takes no keywords to hand on to the attention function"
    return ""


def keys_and_values(
    host: nn.Module, way: Way, given: dict[str, Any], prompts: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The keys and values (1 or batch, key_heads, K, dim) that the host's own forward makes of prompts (.., K, hidden).

    Without position, mask and cache, and with nothing attended to: its projections alone, as the model has them now.

    Args:
        given: what the call that this is for was given, which says in what form a neutral position is.
    """
    first, *others = way.names
    call: dict[str, Any] = {first: prompts}
    if given.get("position_embeddings") is not None:
        call["position_embeddings"] = _no_rotation(given["position_embeddings"], prompts)
    if given.get("position_ids") is not None:
        call["position_ids"] = torch.zeros(1, prompts.shape[1], dtype=torch.long, device=prompts.device)
    for name in ("attention_mask", "past_key_values"):
        if name in others:
            call[name] = None
    made: list[Tensor] = []
    with suppress(_Enough):
        original_class(host).forward(host, **call, lora_prompts=made)
    return made[0], made[1]


def _no_rotation(given: Any, prompts: Tensor) -> Any:
    """The rotary embedding of no rotation, in the form in which a call gives it."""
    length = prompts.shape[1]
    if isinstance(given, Tensor) and given.is_complex():
        return given.new_ones(*(1 for _ in given.shape[:-2]), length, given.shape[-1])
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(g, Tensor) for g in given):
        cos, sin = given
        shape = (*(1 for _ in cos.shape[:-2]), length, cos.shape[-1])
        return cos.new_ones(shape), sin.new_zeros(shape)
    raise LoraError(
        f"model: its attention is given its positions as {type(given).__name__}, of which no neutral value is known; "
        "LLaMA-Adapter's prompts have no position"
    )
