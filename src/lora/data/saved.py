"""A folder that `datasets` saved (`save_to_disk`), read as what it is: JSON notes beside Arrow files.

Read here and not by `datasets.load_from_disk`, so that a look at the data needs no second of imports.
"""

import json
from pathlib import Path
from typing import Any

from ..errors import DataError
from .arrow import rows_of
from .sound import Broken, shown

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_STATE, _SPLITS))


def read_saved(folder: Path, split: str = "") -> list[Any]:
    """The rows of a saved data set, or of one split (train by default) of a saved dictionary of them.

    Raises:
        DataError: no such split, or a part that is missing, cannot be read, or was saved as an index into other rows.
    """
    if (folder / _SPLITS).is_file():
        splits = _note(folder / _SPLITS).get("splits")
        names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        wanted = split or (names[0] if len(names) == 1 else "train")
        if wanted not in names or Path(wanted).name != wanted:
            raise DataError(
                f"{str(folder)!r} has no split {wanted!r}; there is: {', '.join(names) or 'none'}. "
                f"Name one as {folder}:SPLIT"
            )
        folder = folder / wanted
    elif split:
        raise DataError(f"{str(folder)!r} is one saved data set without splits; leave {':' + split!r} out")
    state = _note(folder / _STATE)
    if state.get("_indices_data_files"):
        raise DataError(f"{str(folder)!r} was saved as an index into other rows; save it again after flatten_indices()")
    files = [str(each.get("filename")) for each in state.get("_data_files") or []]
    features = _note(folder / _INFO).get("features") or {}
    rows = (row for name in files for row in _arrow_rows(folder / Path(name).name))
    return [_whole(number, row, features) for number, row in enumerate(rows, 1)]


def _note(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r} is not a note of a saved data set: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{str(path)!r} is not a note of a saved data set: it holds {type(content).__name__}")
    return content


def _arrow_rows(path: Path) -> list[Any]:
    import pyarrow as pa  # type: ignore[import-untyped]

    try:
        with pa.memory_map(str(path)) as file:
            return rows_of(pa.ipc.open_stream(file, options=pa.ipc.IpcReadOptions(use_threads=False)).read_all())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} is not a readable Arrow file: {error}") from error


def _whole(number: int, row: Any, features: Any) -> Any:
    if isinstance(row, Broken):
        return Broken(f"row {number}", row.why)  # counted over all files
    try:
        return _decoded(row, features)
    except DataError as error:
        return Broken(f"row {number}", str(error))


def _decoded(value: Any, feature: Any) -> Any:
    """A value as `datasets` would give it: what it stores as JSON text (its Json type) is parsed."""
    if value is None or not isinstance(feature, (dict, list)):
        return value
    kind = feature.get("_type") if isinstance(feature, dict) else None
    if kind == "Json" and isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"holds a Json value that is not JSON: {shown(value)}") from error
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) and feature else None
        inner = feature.get("feature") if isinstance(feature, dict) else inner
        return [_decoded(part, inner) for part in value]
    if isinstance(value, dict) and isinstance(feature, dict) and not isinstance(kind, str):
        return {name: _decoded(part, feature.get(name)) for name, part in value.items()}
    return value
