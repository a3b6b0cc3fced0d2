"""Training and generation: `Recipe.of(...)`, `run(recipe)`, `generate(model, tokenizer, prompts)`.

Names load on first use: the recipe alone must not cost an import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generation import generate as generate
    from .recipe import Recipe as Recipe
    from .recipe import load_recipe as load_recipe
    from .trainer import Result as Result
    from .trainer import run as run

_HOME = {"Recipe": "recipe", "Result": "trainer", "generate": "generation", "load_recipe": "recipe", "run": "trainer"}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora.train' has no attribute {name!r}; it has {', '.join(_HOME)}")
    value = getattr(import_module(f"lora.train.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
