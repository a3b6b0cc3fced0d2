"""A sequence classifier's labels of rows, beside those that the rows have."""

from collections.abc import Callable, Sequence
from typing import Any

from ..data.labels import LABEL_FIELD
from ..data.rows import Row
from ..errors import LoraError
from ..train.classify import class_logits, encode_labelled, longest_text, pad_id, stored_labels
from .columns import Measured
from .scores import label_scores
from .sets import EvalSet
from .tasks import spread

METRICS = ("accuracy", "f1")


def labels_of(model: str, record: dict[str, Any]) -> list[str]:
    """The labels by number, where the adapter's run made a classifier or the model is stored as one; else none.

    Raises:
        LoraError: a record whose labels are none.
    """
    labels = record.get("labels")
    if labels is None:
        return stored_labels(model)
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(label, str) for label in labels):
        raise LoraError(f"adapter: the labels in its record are {labels!r:.80}; restore run.json, or copy it again")
    return labels


def class_set(rows: Sequence[Row], names: Sequence[str], limit: int | None) -> EvalSet:
    """Rows of a text and its label."""
    chosen = spread(rows, limit)
    references = [[str(row.get(LABEL_FIELD)).strip()] for row in chosen]
    return EvalSet("data", chosen, [], list(range(len(chosen))), references, METRICS, 0, labels=tuple(names))


def measure_classes(
    model: Any, tokenizer: Any, name: str, given: EvalSet, *, batch_size: int = 16, fresh: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Measured:  # fmt: skip
    """Accuracy and F1 of the likeliest labels. Raises `DataError` for a row without text, or with another label.

    Args:
        name: where the model came from.
        fresh: the head was drawn and never trained, which is then said.
    """
    most = longest_text(name, tokenizer) or 512
    data = encode_labelled(given.rows, tokenizer, most, given.labels)
    logits = class_logits(model, data.rows, pad_id(model, tokenizer), batch_size, on_batch)
    answers = [given.labels[i] for i in logits.argmax(1).tolist()]
    scores = label_scores([answer.lower() for answer in answers], given.targets())
    notes = [f"{data.cut:,} texts were cut at {most} tokens"] if data.cut else []
    notes += ["base: its head is fresh, so that its labels are chance"] if fresh else []
    return Measured({metric: scores[metric] for metric in METRICS}, answers, "\n".join(notes))
