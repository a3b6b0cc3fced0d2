"""What a run recorded of itself, so that its adapter is prompted as it was trained. Nothing here imports torch."""

import json
from pathlib import Path
from typing import Any

from ..data.formats import Example, typed_prompt
from ..errors import LoraError
from ..files.adapter import reading
from ..files.header import CONFIG_FILE, LABELS, TENSOR_FILE
from .recipe import RUN_FILE

MERGE_FILE = "lora_merge.json"  # in a merged model's folder, with what its adapter's run recorded as `trained`
KEPT = ("task", "format", "template", "labels")


def run_record(folder: str | Path | None) -> dict[str, Any]:
    """The run.json of an adapter's folder, or what a merged model's folder has of it; empty where there is neither.

    A classifier's labels stand in the adapter's own file as well, whose word is taken where there is no record.

    Raises:
        LoraError: a file that is no such record, or an adapter that cannot be read.
    """
    if folder is None:
        return {}
    if (file := Path(folder) / RUN_FILE).is_file():
        return _read(file)
    if (file := Path(folder) / MERGE_FILE).is_file():
        trained = _read(file).get("trained", {})
        return trained if isinstance(trained, dict) else {}
    if (Path(folder) / TENSOR_FILE).is_file() and (Path(folder) / CONFIG_FILE).is_file():
        labels = reading(Path(folder), lambda file: file.metadata.get(LABELS))
        return {} if labels is None else {"task": "classify", "labels": _parsed(Path(folder), labels)}
    return {}


def kept_record(adapter: Path) -> dict[str, Any]:
    """What a merged model needs of the run of the adapter in it."""
    record = run_record(adapter)
    return {name: record[name] for name in KEPT if record.get(name) is not None}


def prompt_as_trained(text: str, folder: str | Path | None) -> Example:
    """A typed prompt, in the form of the rows that the adapter was trained on where the record says which."""
    return typed_prompt(text, run_record(folder).get("format"))


def style_as_trained(folder: str | Path | None) -> str:
    """The template that an adapter was trained with; "auto" where the record says none."""
    return str(run_record(folder).get("template") or "auto")


def _parsed(folder: Path, labels: str) -> Any:
    try:
        return json.loads(labels)
    except (ValueError, RecursionError) as error:
        raise LoraError(f"adapter: the labels in {str(folder / TENSOR_FILE)!r} are damaged; copy it again") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise TypeError(f"it holds {type(record).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise LoraError(f"adapter: {str(file)!r} is not the record of a run: {error}; restore or delete it") from error
    return record
