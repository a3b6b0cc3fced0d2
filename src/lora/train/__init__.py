"""Training and generation: `Recipe.of(...)`, `run(recipe)`, `generate(model, tokenizer, prompts)`.

Names load on first use: the recipe alone must not cost an import of torch.
"""

from typing import TYPE_CHECKING

from .. import load_on_use

if TYPE_CHECKING:
    from .generation import generate as generate
    from .recipe import Recipe as Recipe
    from .recipe import load_recipe as load_recipe
    from .trainer import Result as Result
    from .trainer import run as run

_HOME = {"Recipe": "recipe", "Result": "trainer", "generate": "generation", "load_recipe": "recipe", "run": "trainer"}
__all__ = list(_HOME)

__getattr__, __dir__ = load_on_use(__name__, _HOME, globals())
