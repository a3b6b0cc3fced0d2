"""What a run trains: the adapter of each method, by the recipe's fields. Needs no torch until it is put into a base."""

from typing import TYPE_CHECKING, Any

from ..config import SETTINGS, TOP_LAYERS, LoraConfig, PromptConfig
from ..errors import LoraError
from . import defaults
from .base_facts import BaseFacts

if TYPE_CHECKING:
    from .recipe import Recipe

LORA, PROMPTS = "lora", "llama-adapter"
METHODS = (LORA, PROMPTS)
_SHARED = {"layers", "train"}  # of LoRA's fields, those that the other method has as well
_ONLY_PROMPTS = {"prompt_length"}


def foreign(method: str) -> set[str]:
    """The recipe's fields that are of the other method."""
    return _ONLY_PROMPTS if method == LORA else {*SETTINGS} - _SHARED


def config_of(recipe: "Recipe") -> LoraConfig | PromptConfig:
    """The adapter's settings.

    Raises:
        LoraError: fields that are wrong, or that belong to the other method; all of them.
    """
    fields = type(recipe).model_fields
    others = [name for name in fields if name in foreign(recipe.method)]
    given = [name for name in others if getattr(recipe, name) != fields[name].get_default(call_default_factory=True)]
    if given:
        raise LoraError(
            "\n  - ".join(f"{name}: method {recipe.method!r} has no such setting; leave it out" for name in given)
        )
    if recipe.method == PROMPTS:
        return PromptConfig(_count(recipe.layers), recipe.prompt_length, train=recipe.train)
    settings = {name: getattr(recipe, name) for name in SETTINGS}
    return LoraConfig(**{**settings, "alpha": defaults.alpha(recipe.rslora) if recipe.alpha is None else recipe.alpha})


def _count(layers: int | list[int] | None) -> int | None:
    if isinstance(layers, list) and len(layers) != 1:
        raise LoraError(f"layers: got {layers}; method {PROMPTS!r} counts them from the top: give one number")
    return layers[0] if isinstance(layers, list) else layers


def parameters(config: LoraConfig | PromptConfig, facts: BaseFacts | None) -> int | None:
    """How many parameters the adapter has, where the base's config tells."""
    if facts is None or config.train or config.bias != "none":
        return None
    if isinstance(config, PromptConfig):
        return facts.prompt_parameters(config.layers, config.prompt_length)
    if config.update != "lora" or config.rank_pattern or config.exclude:
        return None
    return facts.adapter_parameters(config.r, config.targets, config.layers)


def words(config: LoraConfig | PromptConfig) -> str:
    """The adapter in a line."""
    if isinstance(config, PromptConfig):
        layers = f"all layers, or the top {TOP_LAYERS}" if config.layers is None else f"the top {config.layers} layers"
        return f"{PROMPTS}, {config.prompt_length} prompts in {layers}, a gate for each head"
    scale = f"{config.alpha:g} / {'sqrt(' if config.rslora else ''}{config.r}{')' if config.rslora else ''}"
    return f"{config.update}, scaling {scale} = {config.scaling(''):g}"


def put(config: LoraConfig | PromptConfig, model: Any) -> None:
    """Inject the adapter into a base."""
    import lora

    if isinstance(config, PromptConfig):
        lora.llama_adapter.inject(
            model, config.layers, config.prompt_length, gate=config.gate, train=config.train
        )  # fmt: skip
    else:
        lora.inject(model, config=config)
