"""Where a recipe comes from: a file of one's own, one of those that ship with the library, or an entry of a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LoraError, near
from . import finlora
from .recipe_file import read_mapping

_SHIPPED = Path(__file__).parent / "recipes"


def shipped() -> dict[str, Path]:
    """The recipes that come with the library, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def entries(file: Path) -> dict[str, dict[str, Any]]:
    """The recipes that a file holds by name, such as FinLoRA's `finetune_configs.json`.

    Raises:
        LoraError: no such file, not readable, or something in it is no recipe.
    """
    found = read_mapping(file, "recipes")
    for name, entry in found.items():
        if not isinstance(entry, dict):
            raise LoraError(
                f"recipes: {name[:80]!r} in {str(file)!r} is {type(entry).__name__}; the file must hold recipes by "
                "name, each a mapping of field: value"
            )
    return found


def written(source: str | Path, file: Path | None = None) -> dict[str, Any]:
    """What a recipe says, in the words that it was written in.

    Args:
        source: a YAML or JSON file, or the name of a shipped recipe; with `file`, the name of an entry of that.

    Raises:
        LoraError: there is none, or it cannot be read.
    """
    if file is not None:
        known = entries(file)
        if str(source) not in known:
            raise LoraError(f"recipe: {str(file)!r} holds no {str(source)[:80]!r}{near(str(source)[:80], known)}")
        return _meant(str(source), known[str(source)], file.parent)
    own = shipped()
    if str(source) in own and not Path(source).is_file():
        return _meant(str(source), read_mapping(own[str(source)]), Path())
    path = Path(source)
    if path.suffix == "" and path.name == str(source) and not path.exists():
        raise LoraError(f"recipe: there is no recipe and no file {str(source)[:80]!r}{near(str(source)[:80], own)}")
    return read_mapping(path)


def _meant(name: str, entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return finlora.fields_of(name, entry, folder) if finlora.is_entry(entry) else dict(entry)
