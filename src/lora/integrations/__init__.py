"""Adapters in the training code of others: transformers' Trainer and TRL's, accelerate, Lightning, vLLM's weight sync.

Names load on first use, and nobody's package is imported before the user has done so. No class of others is changed:
a trainer takes a subclass of its own class, as a module does that carries adapters.
"""

from typing import TYPE_CHECKING

from .. import load_on_use

if TYPE_CHECKING:
    from .lightning_callback import LightningAdapters as LightningAdapters
    from .references import reference as reference
    from .trainers import adapters_only as adapters_only
    from .weights import merged_weights as merged_weights

_HOME = {
    "LightningAdapters": "lightning_callback", "adapters_only": "trainers", "merged_weights": "weights",
    "reference": "references",
}  # fmt: skip
__all__ = list(_HOME)

__getattr__, __dir__ = load_on_use(__name__, _HOME, globals())
