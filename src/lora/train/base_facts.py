"""What a base model's config says of it, read without torch and transformers."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from ..config import TOP_LAYERS
from ..errors import LoraError, near
from .recipe_file import read_json

_BYTES = 1 << 22  # the longest config; the longest labels' names of a classifier take some hundred KB
_CONFIG, _TOKENIZER = "config.json", "tokenizer_config.json"
_SECONDS = 5.0  # for an answer of the hub
# What architectures call one number.
_NAMES = {
    "hidden": "hidden_size n_embd d_model dim",
    "inner": "intermediate_size n_inner d_ff ffn_dim hidden_dim",
    "layers": "num_hidden_layers n_layer num_layers n_layers",
    "heads": "num_attention_heads n_head num_heads n_heads",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings n_positions max_seq_len",
    "experts": "num_local_experts num_experts n_routed_experts",
}
_TWO_MATRICES = {
    "gpt2", "bert", "roberta", "distilbert", "opt", "gpt_neox", "gptj", "bloom", "falcon", "mpt", "codegen", "phi",
    "gpt_bigcode",
}  # fmt: skip
# Architectures whose layers have exactly the seven linears of `BaseFacts.linears`, by these names.
_SEVEN = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "smollm3", "granite",
    "ministral",
}  # fmt: skip


@dataclass(frozen=True)
class BaseFacts:
    """A base model by its config: None where the config does not say.

    linears: (in, out) of each linear of a layer by its name, for architectures that are known to have no others.
    texts: the longest text in tokens by the tokenizer's config, to which a classifier's are cut.
    whole: these are facts of the whole model, and not of the language model in it.
    """

    kind: str
    parameters: int | None = None
    positions: int | None = None
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    texts: int | None = None
    whole: bool = True
    stored: str | None = None  # how it is quantized, in its config's words
    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def linear_names(self) -> list[str]:
        """Full names of the linears of all layers, where they are known; none of any other architecture."""
        return [
            f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
            for layer in range(self.layers or 0) for name in self.linears
        ]  # fmt: skip

    def adapter_parameters(self, r: int, targets: Any, layers: Any = None) -> int | None:
        """Elements of A and B of one rank, or None where the linears are not known."""
        names: Iterable[str] = self.linears if targets == "all-linear" else targets or ()
        if not self.linears or self.layers is None or isinstance(names, str) or not set(names) <= set(self.linears):
            return None
        count = self.layers if layers is None else len(layers) if isinstance(layers, list) else 1
        return count * sum(r * sum(self.linears[name]) for name in names)

    def prompt_parameters(self, layers: int | None, length: int) -> int | None:
        """Elements of the prompts and gates of a LLaMA-Adapter in so many layers, or None where that is not known."""
        if self.layers is None or self.hidden is None or self.heads is None:
            return None
        return min(layers or TOP_LAYERS, self.layers) * (length * self.hidden + self.heads)


def read_facts(model: str) -> BaseFacts | None:
    """What the config of a folder, or of a name on the hub, says; None where it cannot be reached.

    Raises:
        LoraError: a folder whose config.json is missing or none.
    """
    check_place(model)
    path = Path(model)
    config = _json_in(path) if path.is_dir() else _json_on_hub(model)
    if config is None:
        return None
    written = _TOKENIZER if not path.is_dir() or (path / _TOKENIZER).is_file() else None
    tokenizer = None if written is None else _json_in(path, written) if path.is_dir() else _json_on_hub(model, written)
    return replace(facts_of(config), texts=_number(tokenizer or {}, ["model_max_length"]))


def check_place(name: str) -> None:
    """Raises `LoraError` for what is no model: a mistyped path would be asked of the hub, which speaks of ids."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoraError(f"model: the folder {name!r} has no config.json, so it is not a saved model")
    elif path.exists():
        raise LoraError(f"model: {name!r} is a file; give the model's folder or its name on the hub")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise LoraError(
            f"model: there is no folder {name!r}{_beside(path)}; give a saved model's folder or a name on the hub"
        )
    else:
        beside = _beside(path)
        here = path.parent.is_dir() if path.parent.name else beside.startswith("; near names")
        if here and _json_on_hub(name) is None:  # one may keep some of an organization's models here
            raise LoraError(
                f"model: there is no folder {name!r}{beside}; nor does the hub answer with a model of this name"
            )


def _beside(path: Path) -> str:
    """The names of the models beside this place: near ones, or else the first."""
    try:
        found = sorted(str(each.parent) for each in path.parent.glob("*/config.json"))
    except OSError:
        return ""
    return near(str(path), found)


def facts_of(config: Mapping[str, Any]) -> BaseFacts:
    """The facts in a config.json; a multimodal model's are those of its language model."""
    inner = config.get("text_config")
    text = {**config, **inner} if isinstance(inner, dict) else config
    kind = text.get("model_type")
    number = {name: _number(text, keys.split()) for name, keys in _NAMES.items()}
    quantized = config.get("quantization_config")
    linears = _linears(text, number)
    return BaseFacts(
        kind=kind if isinstance(kind, str) else "unknown",
        parameters=_parameters(text, number, linears),
        positions=number["positions"], layers=number["layers"], hidden=number["hidden"], heads=number["heads"],
        stored=str(quantized.get("quant_method", "a format of its own")) if isinstance(quantized, dict) else None,
        whole=not isinstance(inner, dict),
        linears=linears if kind in _SEVEN and not number["experts"] else {},
    )  # fmt: skip


def _number(config: Mapping[str, Any], keys: list[str]) -> int | None:
    values = (config.get(key) for key in keys)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 < v < 1 << 40), None)


def _linears(config: Mapping[str, Any], number: Mapping[str, int | None]) -> dict[str, tuple[int, int]]:
    hidden, heads = number["hidden"], number["heads"]
    if hidden is None or heads is None:
        return {}
    inner = _number(config, ["moe_intermediate_size"]) if number["experts"] else None
    inner = inner or number["inner"] or 4 * hidden
    size = _number(config, ["head_dim"]) or max(1, hidden // heads)
    queries, keys = heads * size, (_number(config, ["num_key_value_heads"]) or heads) * size
    return {
        "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip


def _parameters(
    config: Mapping[str, Any], number: Mapping[str, int | None], linears: Mapping[str, tuple[int, int]]
) -> int | None:
    """About how many there are: the matrices of all layers and the vocabulary's."""
    hidden, layers = number["hidden"], number["layers"]
    if not linears or hidden is None or layers is None:
        return None
    attention = sum(a * b for name, (a, b) in linears.items() if name[0] in "qkvo")
    mlp = sum(a * b for name, (a, b) in linears.items() if name[0] not in "qkvo")
    if config.get("model_type") in _TWO_MATRICES:
        mlp = mlp * 2 // 3
    heads = 1 if config.get("tie_word_embeddings", config.get("model_type") in _TWO_MATRICES) else 2
    return layers * (attention + mlp * (number["experts"] or 1)) + heads * (number["vocabulary"] or 0) * hidden


def _json_in(folder: Path, file: str = _CONFIG) -> dict[str, Any]:
    path = folder / file
    try:
        if path.stat().st_size > _BYTES:
            raise LoraError(f"it has {path.stat().st_size:,} bytes; at most {_BYTES:,} are read")
        config = read_json(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise LoraError(f"model: {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a LoraError as well
        raise LoraError(f"model: {str(path)!r} is no config: {error}") from error
    if not isinstance(config, dict):
        raise LoraError(f"model: {str(path)!r} holds {type(config).__name__}; it must be a mapping")
    return config


def _json_on_hub(model: str, file: str = _CONFIG) -> dict[str, Any] | None:
    """From the hub's cache, or from the hub with one short question: its own client asks six times, 23 seconds."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise LoraError(f"model: {model[:200]!r} is neither a folder here nor a name on the hub") from error
    cached = try_to_load_from_cache(model, file)
    if isinstance(cached, (str, os.PathLike)):
        return _json_in(Path(cached).parent, file)
    if constants.HF_HUB_OFFLINE:
        return None
    url = f"{constants.ENDPOINT}/{quote(model)}/resolve/main/{file}"
    try:
        with urlopen(Request(url, headers=build_hf_headers()), timeout=_SECONDS) as answer:
            config = read_json(answer.read(_BYTES).decode("utf-8"))
    except (URLError, OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None
