"""How long a run is, and how often it is saved. Needs no torch."""

import math
from dataclasses import dataclass

from .defaults import total_steps
from .recipe import Recipe


@dataclass(frozen=True)
class Length:
    """Optimizer steps: of the whole run, of one pass over the rows, of the warm-up, and between two checkpoints."""

    steps: int
    per_pass: int
    warmup: int
    save_every: int

    @classmethod
    def of(cls, recipe: Recipe, rows: int) -> "Length":
        """From a resolved recipe and the number of rows, or of packs."""
        per_pass = math.ceil(rows / (recipe.batch_size * recipe.grad_accum))
        steps = total_steps(recipe, rows)
        return cls(steps, per_pass, int(recipe.warmup_steps or 0), recipe.save_every or steps)
