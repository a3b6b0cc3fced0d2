"""What can be told before anything heavy is imported: a run that cannot work ends in a second, not once the base loads.

Nothing here imports torch or transformers.
"""

import shutil
import tempfile
import warnings
from pathlib import Path

from ..data.rows import Glance, glance
from ..errors import LoraError, LoraWarning
from ..files.header import CONFIG_FILE
from .base_facts import BaseFacts, read_facts
from .defaults import held_out, resolved
from .methods import parameters
from .recipe import Recipe

_LEAST = 1 << 20  # bytes that anything written needs
_COPIES = 10  # an adapter, and three checkpoints of it with two states of the optimizer for each parameter


def cheap(recipe: Recipe, force: bool = False) -> tuple[BaseFacts | None, Glance]:
    """Checks the base's folder, the rows' first look, and the place for the adapter; what it found on the way.

    Args:
        force: an adapter that is in the place already may be replaced.

    Raises:
        LoraError: the base is no model, the place is taken or cannot be written, or the settings do not fit the base.
        DataError: the rows are not there, or fit no format.
    """
    check_held_out(recipe)
    facts = read_facts(recipe.model)
    resolved(recipe, facts)
    check_out(recipe, force, facts)
    found = glance(recipe.data, task=recipe.task)
    if found.rows is not None:
        resolved(recipe, facts, found.rows - held_out(recipe, found.rows))
    if recipe.eval_data is not None:
        glance(recipe.eval_data, "eval_data", recipe.task)
    return facts, found


def check_held_out(recipe: Recipe) -> None:
    """Raises `LoraError` where a setting asks for what is done with held-out rows, and there are none.

    samples: 0 asks for nothing, which a run without held-out rows writes into its recipe.
    """
    if recipe.eval_data is not None or recipe.eval_share is not None:
        return
    idle = [name for name in ("eval_every", "early_stop") if getattr(recipe, name) is not None]
    if recipe.samples and "samples" in recipe.model_fields_set:
        idle.append("samples")
    if idle:
        said = " and ".join(f"{name}={getattr(recipe, name)}" for name in idle)
        raise LoraError(f"{said} needs eval_data or eval_share: no rows are held out; give one, or leave it out")


def check_out(recipe: Recipe, force: bool, facts: BaseFacts | None = None) -> Path:
    """The place for the adapter. Raises `LoraError` where it is taken, cannot be written, or is too small."""
    out = Path(recipe.out)
    try:
        if out.exists() and not out.is_dir():
            raise LoraError(f"out: {recipe.out!r} is a file; give a folder")
        if (out / CONFIG_FILE).exists() and not force:
            raise LoraError(
                f"out: {recipe.out!r} already holds an adapter; give another folder, or --force to replace it"
            )
        if out.is_dir() and Path(recipe.model).is_dir() and out.samefile(recipe.model):
            raise LoraError(f"out: {recipe.out!r} is the base's own folder; give another")
        place = out
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise LoraError(f"out: {recipe.out!r} lies under {str(place)!r}, which is a file; give another folder")
        with tempfile.TemporaryFile(
            dir=place
        ):  # who may write where is for the system to say, and it may say no to root
            pass
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise LoraError(
            f"out: {recipe.out[:200]!r} cannot be written: {error.strerror}; give another folder"
        ) from error
    _check_space(recipe, free, facts)
    return out


def _check_space(recipe: Recipe, free: int, facts: BaseFacts | None) -> None:
    count = parameters(recipe.adapter(), facts)
    needed = _LEAST if count is None else 4 * count
    where = f"on the disk of {recipe.out!r}, which has {free / 2**20:,.0f} MiB left"
    if free < needed:
        raise LoraError(f"out: the adapter takes {needed / 2**20:,.0f} MiB {where}; make room, or give another folder")
    if free < _COPIES * needed:
        warnings.warn(
            f"the adapter with its checkpoints takes up to {_COPIES * needed / 2**20:,.0f} MiB {where}", LoraWarning,
            stacklevel=3,
        )  # fmt: skip
