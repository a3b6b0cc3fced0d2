"""Whether the tensors of a file are those that an adapter needs, by what the header says of them."""

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import LoraError
from .adapter import AdapterFile
from .bounded import clip
from .header import CONFIG_FILE

if TYPE_CHECKING:
    from torch import Tensor


def check_fit(file: AdapterFile, wanted: Mapping[str, "Tensor"], copies: Container[str]) -> None:
    """Compare names, shapes and kinds of dtype, both ways.

    Args:
        wanted: what the file should fill, by key; tied ones under each of theirs, of which the file needs one.
        copies: keys that the file may have beside these.

    Raises:
        LoraError: what does not fit, by name.
    """
    entries = file.entries
    there = [(key, tensor, entries[key]) for key, tensor in wanted.items() if key in entries]
    held = {id(tensor) for _, tensor, _ in there}
    problems = {
        "of the adapter's tensors missing": [k for k, t in wanted.items() if k not in entries and id(t) not in held],
        "unexpected": [key for key in entries if key not in wanted and key not in copies],
        "of another shape": [
            f"{key} is {entry.shape}, expected {tuple(tensor.shape)}"
            for key, tensor, entry in there
            if entry.shape != tensor.shape
        ],
        "of another kind (integers or floating point)": [
            key for key, tensor, entry in there if entry.floating != tensor.is_floating_point()
        ],
    }
    if any(problems.values()):
        raise misfit(file, problems)


def misfit(file: AdapterFile, problems: Mapping[str, Sequence[str]]) -> LoraError:
    """The error that says what does not fit: names, or what is wrong with them, by what they have in common."""
    told = "; ".join(f"{len(found)} {label}: {few(found)}" for label, found in problems.items() if found)
    return LoraError(
        f"{file.folder}: its tensors do not fit this model with its {CONFIG_FILE}; {told}. Load it on the model that "
        "it was trained on, or copy it again if it is not whole"
    )


def few(names: Sequence[str]) -> str:
    """The first three."""
    return ", ".join(clip(name, 200) for name in names[:3]) + (", ..." if len(names) > 3 else "")
