"""Low-rank adaptation of frozen models (Hu et al., 2021, arXiv:2106.09685).

    h = W0 x + s B A dropout(x)        A: (r, in)  B: (out, r)  s = alpha / r

Names load on first use, so that `lora --help` and `import lora` cost nothing.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import llama_adapter as llama_adapter
    from .activation import activate as activate
    from .activation import disabled as disabled
    from .activation import remove as remove
    from .atomic import steady as steady
    from .config import LoraConfig as LoraConfig
    from .errors import LoraError as LoraError
    from .errors import LoraWarning as LoraWarning
    from .injection import inject as inject
    from .loading import load as load
    from .merging import merge as merge
    from .merging import unmerge as unmerge
    from .preparation import param_groups as param_groups
    from .preparation import prepare as prepare
    from .report import summary as summary
    from .saving import save as save

__version__ = "0.1.0"

_HOME = {
    "LoraConfig": "config", "LoraError": "errors", "LoraWarning": "errors", "activate": "activation",
    "disabled": "activation", "inject": "injection", "load": "loading", "merge": "merging",
    "param_groups": "preparation", "prepare": "preparation", "remove": "activation", "save": "saving",
    "steady": "atomic", "summary": "report", "unmerge": "merging",
}  # fmt: skip
__all__ = [*_HOME, "__version__"]  # noqa: PLE0604  (the names are those of _HOME)


def load_on_use(
    package: str, home: dict[str, str], names: dict[str, Any]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`: `home` says in which of its modules a name is, `names`: its globals."""

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(home)}")
        names[name] = value = getattr(import_module(f"{package}.{home[name]}"), name)
        return value

    return load, lambda: sorted(names["__all__"])


_load, __dir__ = load_on_use(__name__, _HOME, globals())


def __getattr__(name: str) -> Any:
    if name == "llama_adapter":  # a package of verbs, so that `import lora` is enough for it
        return import_module(f"{__name__}.{name}")
    return _load(name)
