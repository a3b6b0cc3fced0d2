"""The base, the adapter and the merged model, one after the other in one model, each measured on the same rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lora

from ..data.collate import PaddingCollator
from ..data.encode import EncodedData, encode_rows
from ..data.template import PromptTemplate
from ..errors import LoraError
from ..train.base import max_positions
from ..train.defaults import LONGEST
from ..train.generation import generate
from ..train.losses import held_out_loss
from .scores import bleu, exact, label_scores, perplexity, rouge_l
from .sets import EvalSet

BASE, ADAPTER, MERGED = "base", "adapter", "merged"
_AT_ONCE = 4096  # tokens of a batch whose loss is measured: their logits over a large vocabulary take gigabytes


@dataclass(frozen=True)
class Measured:
    """One column of one set: scores by metric, the answer to each of the set's prompts, and what is to be said."""

    scores: dict[str, float]
    answers: list[str]
    note: str = ""


def columns(adapted: bool, merged: bool) -> tuple[str, ...]:
    """The columns of a table. Raises `LoraError` where there is nothing to merge."""
    if merged and not adapted:
        raise LoraError("merged: there is no adapter to merge; give --adapter")
    return (BASE, *((ADAPTER,) if adapted else ()), *((MERGED,) if merged else ()))


def side_by_side(
    model: Any, names: Sequence[str], sets: Sequence[EvalSet], measure_one: Callable[[EvalSet, str], Measured]
) -> list[tuple[EvalSet, dict[str, Measured]]]:
    """Each set with its columns by name; the model goes through the columns one after the other, and is left as it was.

    measure_one: measures a set on the model as it is now; it is told the column's name.
    """
    found: list[dict[str, Measured]] = [{} for _ in sets]
    for column in names:
        with as_column(model, column, adapted=ADAPTER in names):
            for given, measured in zip(sets, found, strict=True):
                measured[column] = measure_one(given, column)
    return list(zip(sets, found, strict=True))


@contextmanager
def as_column(model: Any, column: str, adapted: bool) -> Iterator[None]:
    """Within it the model is that column: its adapters disabled, acting, or merged in place; then as it was."""
    if column == MERGED:
        lora.merge(model)
        try:
            yield
        finally:
            lora.unmerge(model)
    elif column == BASE and adapted:
        with lora.disabled(model):
            yield
    else:
        yield


def measure(
    model: Any, tokenizer: Any, given: EvalSet, *, style: str = "auto", batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> Measured:  # fmt: skip
    """The set's metrics of a model as it is now, through the template that training uses.

    Raises:
        LoraError: a prompt with no room for its answer, or rows of which none can be trained on.
    """
    scores: dict[str, float] = {}
    answers: list[str] = []
    note = ""
    if "perplexity" in given.metrics:
        data = encode_rows(given.rows, PromptTemplate(tokenizer, style), _max_length(model), given.name)
        scores["perplexity"] = perplexity(_loss(model, tokenizer, data, batch_size))
        note = "\n".join(f"{given.name}: {line}" for line in str(data).splitlines()[1:])
    if set(given.metrics) - {"perplexity"}:
        answers = generate(
            model, tokenizer, given.prompts, max_new_tokens=given.max_new_tokens, batch_size=batch_size, style=style,
            on_batch=on_batch,
        )  # fmt: skip
        scores |= _answer_scores(given, answers)
    return Measured({metric: scores[metric] for metric in given.metrics}, answers, note)


def _answer_scores(given: EvalSet, answers: Sequence[str]) -> dict[str, float]:
    references = given.by_prompt()
    texts = {"bleu": bleu, "rouge_l": rouge_l, "exact": exact}
    scores = {metric: score(answers, references) for metric, score in texts.items() if metric in given.metrics}
    if given.labels:
        scores |= label_scores(given.labels_in(answers), given.targets())
    return scores


def _loss(model: Any, tokenizer: Any, data: EncodedData, batch_size: int) -> float:
    rows = sorted(data.rows, key=lambda row: len(row["input_ids"]), reverse=True)
    collate = PaddingCollator(tokenizer.pad_token_id or 0)  # the padding is masked
    batches, start = [], 0
    while start < len(rows):
        count = min(batch_size, max(1, _AT_ONCE // len(rows[start]["input_ids"])))
        batches.append(rows[start : start + count])
        start += count
    return held_out_loss(model, (collate(batch) for batch in batches))


def _max_length(model: Any) -> int:
    return min(max_positions(model.config) or LONGEST, LONGEST)
