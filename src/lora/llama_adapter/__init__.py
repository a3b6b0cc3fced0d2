"""LLaMA-Adapter (Zhang et al., 2023, arXiv:2303.16199): learned prompts in the attentions of a frozen decoder.

    attention(q) = softmax(q K^T s + mask) V + tanh(g) softmax(q P_k^T s) P_v        g: a gate for each head, 0 at first

The verbs here make such an adapter. The library's own (`lora.save`, `lora.activate`, ...) work on it as on any other.
"""

from typing import TYPE_CHECKING

from .. import load_on_use

if TYPE_CHECKING:
    from .by_row import rows as rows
    from .conditioning import condition as condition
    from .injecting import inject as inject
    from .published import load_published as load_published

_HOME = {"condition": "conditioning", "inject": "injecting", "load_published": "published", "rows": "by_row"}
__all__ = [*_HOME]  # noqa: PLE0604  (the names are those of _HOME)
__getattr__, __dir__ = load_on_use(__name__, _HOME, globals())
