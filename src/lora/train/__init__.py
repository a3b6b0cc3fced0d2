"""Training and generation: `Recipe.of(...)`, `run(recipe)`, `generate(model, tokenizer, prompts)`.

Names load on first use: the recipe alone must not cost an import of torch.
"""

from typing import TYPE_CHECKING

from .. import load_on_use

if TYPE_CHECKING:
    from .generation import generate as generate
    from .job import Result as Result
    from .job import run as run
    from .recipe import Recipe as Recipe
    from .recipe import load_recipe as load_recipe

_HOME = {"Recipe": "recipe", "Result": "job", "generate": "generation", "load_recipe": "recipe", "run": "job"}
__all__ = list(_HOME)

__getattr__, __dir__ = load_on_use(__name__, _HOME, globals())
