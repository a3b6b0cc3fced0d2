"""Low-rank adaptation of frozen models (Hu et al., 2021, arXiv:2106.09685).

    h = W0 x + s B A dropout(x)        A: (r, in)  B: (out, r)  s = alpha / r

Names load on first use, so that `lora --help` and `import lora` cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activation import activate as activate
    from .activation import disabled as disabled
    from .activation import remove as remove
    from .config import LoraConfig as LoraConfig
    from .errors import LoraError as LoraError
    from .errors import LoraWarning as LoraWarning
    from .injection import inject as inject
    from .merging import merge as merge
    from .merging import unmerge as unmerge
    from .preparation import prepare as prepare
    from .report import summary as summary
    from .saving import load as load
    from .saving import save as save

__version__ = "0.1.0"

_HOME = {
    "LoraConfig": "config", "LoraError": "errors", "LoraWarning": "errors", "activate": "activation",
    "disabled": "activation", "inject": "injection", "load": "saving", "merge": "merging", "prepare": "preparation",
    "remove": "activation", "save": "saving", "summary": "report", "unmerge": "merging",
}  # fmt: skip
__all__ = [*_HOME, "__version__"]  # noqa: PLE0604  (the names are those of _HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora' has no attribute {name!r}; it has {', '.join(_HOME)}")
    value = getattr(import_module(f"lora.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
