"""The hand-off to EleutherAI's lm-eval: its tasks, on the model as it is here, adapter and all."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import LoraError
from .columns import ADAPTER, as_column

_ROWS = {"sample_len": "rows"}  # what it calls the number of a task's rows


def check_harness() -> None:
    """Raises `LoraError` where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise LoraError("lm-eval: it needs the package of that name; pip install lm-eval")


def side_by_side(
    model: Any, tokenizer: Any, names: Sequence[str], tasks: Sequence[str], batch_size: int, limit: int | None
) -> list[tuple[str, str, dict[str, float]]]:
    """(task, metric, value by column) for the columns `names`, one after the other in the model."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for column in names:
        with as_column(model, column, adapted=ADAPTER in names):
            for key, value in run_harness(model, tokenizer, tasks, batch_size, limit).items():
                found.setdefault(key, {})[column] = value
    return [(task, metric, values) for (task, metric), values in found.items()]


def run_harness(
    model: Any, tokenizer: Any, tasks: Sequence[str], batch_size: int, limit: int | None
) -> dict[tuple[str, str], float]:
    """lm-eval's numbers by (task, metric). Its prompts are its own: no template of ours is used.

    Raises:
        LoraError: it is not installed, or knows no such task.
    """
    check_harness()
    lm_eval: Any = import_module("lm_eval")
    wrapped = import_module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size
    )
    try:
        results = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)["results"]
    except (KeyError, ValueError) as error:  # how it says that a task is unknown
        raise LoraError(f"lm-eval: {', '.join(tasks)} could not be run: {error}") from error
    return {
        (task, _ROWS.get(metric, metric)): float(value)
        for task, found in results.items()
        for metric, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
