"""What is written at the end of a run: the adapter first, then what tells of it."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

import lora

from ..bases import weight_of
from ..errors import CheckError, LoraError, LoraWarning
from ..files.commit import replaced, told
from ..files.fingerprint import quantization
from ..layers.host import base_modules
from . import card, picture, report_page
from .evaluations import SAMPLES_FILE
from .examine import examined
from .metrics import METRICS_FILE
from .outcome import Outcome
from .place import FOLDER, Place
from .places import FIELDS, published, published_base, without_places
from .quiet import quiet
from .recipe import RECIPE_FILE, RUN_FILE, Recipe
from .rows import RunRows
from .trainer import LoraTrainer

IGNORED_FILE = ".gitignore"


def trained_digest(model: Any) -> str:
    """A SHA-256 of all that trains."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = parameter.detach().to("cpu", copy=True).contiguous().view(-1).view(torch.uint8)
            found.update(values.numpy().data)
    return found.hexdigest()


def check_moved(model: Any, before: str) -> None:
    """Raises `CheckError` where what trains is to the bit as it was before the first step, or is not finite."""
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
        raise CheckError("the adapter holds NaN or infinity, so it was not saved; lower lr")
    if trained_digest(model) == before:
        raise CheckError(
            "the run has changed nothing: what trains is as it was before the first step, so it was not saved; is lr "
            "too small for the dtype, or does no loss reach the targets?"
        )


def save_adapter(model: Any, place: Place) -> tuple[Path, str | None]:
    """(where the adapter is saved, why it is not in `place.out`); a run's result is not lost to a full disk.

    Raises:
        LoraError: it can be saved nowhere.
    """
    try:
        with published_base(model):
            lora.save(model, place.out)
        return place.out, None
    except LoraError as error:
        why = str(error)
    for folder in place.elsewhere():
        with suppress(LoraError):
            with published_base(model):
                lora.save(model, folder)
            return folder, why
        with suppress(OSError):
            folder.rmdir()
    raise LoraError(f"out: the adapter could be saved neither there nor in the temporary folder: {why}")


def conclude(
    recipe: Recipe, place: Place, folder: Path, record: dict[str, Any], trainer: LoraTrainer, rows: RunRows
) -> Outcome | None:
    """Asks whether it worked, where the recipe wants it, and writes all that stands beside the adapter.

    The model is of no more use where it was asked. Where run.json is there, the run is finished; the pages read it.
    """
    outcome = None
    if recipe.check:
        with quiet():
            outcome, probe = examined(recipe, folder, trainer.model, rows, trainer.length)
        shown = outcome.to_json()
        for line in shown["lines"]:
            line["text"] = without_places(line["text"], recipe.model_dump(), folder)
        record |= {"outcome": shown, "probe": probe.record()}
    write_all({
        "metrics.jsonl": lambda: move_metrics(place, folder),
        "loss.png": lambda: picture.draw(folder),
        IGNORED_FILE: lambda: ignore_checkpoints(folder),
        "run.json": lambda: write_record(folder, recipe, record),
        "report.md": lambda: report_page.write(folder),
        "README.md": lambda: _card(folder),
    })  # fmt: skip
    return outcome


def _card(folder: Path) -> None:
    kept = card.write(folder)
    if kept is not None:
        warnings.warn(f"out: {kept}", LoraWarning, stacklevel=2)


def write_all(writers: dict[str, Callable[[], object]]) -> None:
    """Call each; what could not be written is said by its name: the adapter is there, and the rest tells of it."""
    for name, write in writers.items():
        try:
            with told(name):
                write()
        except LoraError as error:
            warnings.warn(f"out: {name} could not be written: {error}", LoraWarning, stacklevel=2)


def move_metrics(place: Place, folder: Path) -> None:
    """The curve and the samples to the adapter's side, where it was written elsewhere on the way."""
    for source in (place.live / METRICS_FILE, place.live / SAMPLES_FILE):
        if place.live != folder and source.is_file():
            content = source.read_bytes()
            with replaced(folder / source.name) as file:
                file.write_bytes(content)
            if place.live == place.checkpoints:
                os.unlink(source)


def write_record(folder: Path, recipe: Recipe, record: dict[str, Any]) -> None:
    """recipe.yaml, then run.json, whose being there says that the run is finished.

    The folder is what people publish, so the recipe has names there where it had absolute paths.
    """
    places = {name: place for name in FIELDS if (place := getattr(recipe, name)) is not None}
    shown = recipe.model_copy(update={name: published(place) for name, place in places.items()})
    note = f"# Absolute paths are names here; {FOLDER}/{RECIPE_FILE} has them, and runs again.\n"
    note = note if shown != recipe else ""
    for name, content in ((RECIPE_FILE, note + shown.to_yaml()), (RUN_FILE, json.dumps(record, indent=2) + "\n")):
        with replaced(folder / name) as file:
            file.write_text(content, encoding="utf-8")


def ignore_checkpoints(folder: Path) -> None:
    """The way back stays at home: git and the hub's upload leave out what this file names. One that is there stays."""
    if not (folder / IGNORED_FILE).exists():
        with replaced(folder / IGNORED_FILE) as file:
            file.write_text(f"{FOLDER}/\n", encoding="utf-8")


def facts(model: Any, rows: RunRows) -> dict[str, Any]:
    """What run.json says of a model, of its rows, and of what it ran on."""
    data = rows.encoded
    labels = {"labels": rows.names} if rows.names else {}
    weights = {name: weight for name, module in base_modules(model) if (weight := weight_of(module)) is not None}
    return {
        "format": data.format, "template": data.style, "rows": len(data.rows), "rows_too_long": data.dropped,
        "max_length": data.max_length, **labels,
        "quantisation": quantization(weights),
        "versions": {each.__name__: each.__version__ for each in (lora, torch, transformers)},
    }  # fmt: skip
