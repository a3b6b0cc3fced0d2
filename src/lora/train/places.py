"""Names in the place of paths, for what people publish: an adapter's folder says what it was made from, and not where
that lies on somebody's machine."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

FIELDS = ("model", "data", "eval_data", "out")
"""The fields of a recipe that may be paths."""

_HUB_NAME = re.compile(r"[A-Za-z0-9]([\w.-]*\w)?(/[A-Za-z0-9]([\w.-]*\w)?)?", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:(?=[/\\])")
_ROWS = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|txt|gz)$", re.IGNORECASE)
# An absolute path in a sentence: with a root, a drive, a home or a share in front, and not the middle of an address.
_PATH = re.compile(r"(?<![\w.:/\\<])(?:~[\w.-]*|\.{1,2}|[A-Za-z]:|\\)?(?:[/\\][^\s/\\'\"`<>|,;:]+)+[/\\]?")


def base_name(model: str) -> tuple[str, bool]:
    """(what the base is called, whether that is a name on the hub): the last part alone of a local path."""
    if _HUB_NAME.fullmatch(model) and not os.path.lexists(model):
        return model, True
    return _last(os.path.abspath(model) if model.strip("./\\") == "" else model), False


def data_name(data: str) -> str:
    """The name of a file or folder of rows without where it lies; a name on the hub as it is."""
    path = data.partition(":")[0]
    on_hub = (
        not _DRIVE.match(data) and _HUB_NAME.fullmatch(path) and not _ROWS.search(path) and not os.path.lexists(path)
    )
    return data if on_hub else _last(data)


def published(place: str) -> str:
    """`./name` for a path from the root of a machine; what is relative, or a name on the hub, as it is.

    So it is told from a name on the hub, and nobody is asked for it in vain.
    """
    is_absolute = place.startswith(("/", "~", "\\\\")) or _DRIVE.match(place) is not None
    return f"./{_last(place.rstrip('/'))}" if is_absolute else place


@contextmanager
def published_base(model: Any) -> Iterator[None]:
    """Within it, the model is called by what is published of where it came from."""
    own = getattr(model, "name_or_path", None)
    if not isinstance(own, str):
        yield
        return
    model.name_or_path = published(own)
    try:
        yield
    finally:
        model.name_or_path = own


def _last(path: str) -> str:
    name = PureWindowsPath(path).name if "\\" in path or _DRIVE.match(path) else PurePosixPath(path).name
    return name or "a local folder"


def without_places(text: str, recipe: Mapping[str, Any], folder: Path) -> str:
    """A sentence with the names alone of the paths in it; `folder` is the adapter's."""
    own = [str(recipe.get(name) or "") for name in FIELDS]
    folders = [str(folder), str(folder.resolve())]
    for path in sorted({*own, *folders}, key=len, reverse=True):  # with spaces in them, or relative
        if ("/" in path or "\\" in path) and not base_name(path)[1]:
            name = _last(path).replace("\\", "")  # in a replacement it has a meaning
            text = re.sub(rf"(?<![\w./\\]){re.escape(path)}(?![\w/\\-]|\.\w)", name, text)
    return _PATH.sub(lambda found: _last(found[0].rstrip("/\\")), text)
