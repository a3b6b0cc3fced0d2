"""What is to be answered: the distinct prompts of some rows, and what each row's answer should have been."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..data.formats import Example, RowFormat, detect
from ..data.rows import Row
from ..data.sound import all_told, place
from ..errors import DataError, LoraError
from .scores import first_label, split_joined
from .tasks import LABELS, METRICS, TEXT, Task, read_task, spread

REFERENCES = "references"  # a row's field for several right answers, in place of its answer or beside it


@dataclass(frozen=True)
class EvalSet:
    """Rows of one kind, read for evaluation.

    rows: with an answer each, as training would read them.
    prompts: each distinct prompt once; empty for plain texts, of which only the loss is measured.
    prompt_of: the number of each row's prompt.
    references: of each row, at least one.
    labels: those that an answer may name, where the metrics are of labels.
    """

    name: str
    rows: list[Row]
    prompts: list[Example]
    prompt_of: list[int]
    references: list[list[str]]
    metrics: tuple[str, ...]
    max_new_tokens: int
    labels: tuple[str, ...] = ()
    joined: bool = False

    def by_prompt(self) -> list[list[str]]:
        """The references of all rows of each prompt, without repeats."""
        found: list[dict[str, None]] = [{} for _ in self.prompts]
        for prompt, references in zip(self.prompt_of, self.references, strict=True):
            found[prompt] |= dict.fromkeys(references)
        return [list(each) for each in found]

    def targets(self) -> list[str]:
        """The right labels: one for each row, or for each part of its answer."""
        return [label for references in self.references for label in self._parts(references[0])]

    def labels_in(self, answers: Sequence[str]) -> list[str]:
        """The label found in each row's answer or in each part of it, so that they stand beside `targets`."""
        found = []
        for prompt, references in zip(self.prompt_of, self.references, strict=True):
            answer = answers[prompt]
            parts = split_joined(answer, len(self._parts(references[0]))) if self.joined else [answer]
            found += [first_label(part, self.labels) for part in parts]
        return found

    def _parts(self, target: str) -> list[str]:
        return split_joined(target, target.count(",") + 1) if self.joined else [target]


def task_set(task: Task, folder: Path, limit: int | None, max_new_tokens: int | None) -> EvalSet:
    """One of FinLoRA's tasks. Raises `DataError` where its file is missing or wrong."""
    rows = read_task(task, folder)
    chosen = spread(rows, limit)
    whole = make_set(task.name, chosen, task.metrics, max_new_tokens or task.max_new_tokens, task.joined)
    if task.metrics == LABELS:
        targets = (str(row["target"]) for row in rows)  # of the whole file, however few rows are asked
        parts = (part for t in targets for part in (split_joined(t, t.count(",") + 1) if task.joined else [t]))
        return replace(whole, labels=task.labels or tuple(dict.fromkeys(parts)))
    return whole


def data_set(
    rows: Sequence[Row], metrics: Sequence[str], limit: int | None, max_new_tokens: int | None, name: str = "data"
) -> EvalSet:
    """Rows in any training format; metrics of labels take each distinct answer for a label.

    Raises:
        DataError: rows that fit no format or lack an answer.
        LoraError: a metric that there is not.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise LoraError(f"metrics: there is no {', '.join(map(repr, unknown))}; allowed: {', '.join(METRICS)}")
    whole = make_set(name, rows, tuple(metrics) or TEXT, max_new_tokens or 128)
    if not whole.prompts:
        if set(metrics) - {"perplexity"}:
            raise LoraError("metrics: plain texts have no answers, so that perplexity alone can be measured on them")
        whole = replace(whole, metrics=("perplexity",))
    labels = tuple(dict.fromkeys(references[0] for references in whole.references))
    chosen = whole if limit is None else make_set(name, spread(rows, limit), whole.metrics, whole.max_new_tokens)
    return replace(chosen, labels=labels if set(whole.metrics) & set(LABELS) else ())


def make_set(
    name: str, rows: Sequence[Row], metrics: tuple[str, ...], max_new_tokens: int, joined: bool = False
) -> EvalSet:
    """Reads rows of one format, the first row's. Raises `DataError` that names the rows that have another."""
    known = _format(rows[0], name)
    read: list[Row] = []
    prompts: dict[str, int] = {}
    examples: list[Example] = []
    prompt_of, references, faults = [], [], list[str]()
    for number, row in enumerate(rows, 1):
        try:
            whole, right = _with_answer(row, known)
            prompt = known.read(whole, False) if known.turns is not None else None
        except LoraError as error:
            faults.append(f"row {place(row, number)}: {error}")
            continue
        read.append(whole)
        if prompt is None:
            continue
        key = json.dumps([prompt.messages, prompt.tools])
        if key not in prompts:
            prompts[key] = len(examples)
            examples.append(prompt)
        prompt_of.append(prompts[key])
        references.append(right)
    if faults:
        raise DataError(f"{name}: {all_told(faults, 'cannot be measured')}")
    return EvalSet(name, read, examples, prompt_of, references, metrics, max_new_tokens, joined=joined)


def _format(row: Row, name: str) -> RowFormat:
    try:
        return detect(row, answers=REFERENCES not in row)
    except LoraError as error:
        raise DataError(f"{name}: row {place(row, 1)}: {error}") from error


def _with_answer(row: Row, known: RowFormat) -> tuple[Row, list[str]]:
    """The row with an answer, its first reference where it had none, and all its right answers."""
    given = row.get(REFERENCES)
    fields = {field: value for field, value in row.items() if field != REFERENCES}
    if given is not None:
        if (
            not isinstance(given, list)
            or not given
            or not all(isinstance(each, str) and each.strip() for each in given)
        ):
            raise DataError(f"{REFERENCES} must be a list of at least one text")
        if len(known.fields) > 1:
            fields.setdefault(known.fields[1], given[0])
    missing = [field for field in known.fields if field not in fields]
    if missing:
        raise DataError(f"lacks {', '.join(missing)}; the first row's format is {known.name}")
    if known.turns is None:
        return fields, []
    last = known.read(fields, True).messages[-1]
    return fields, list(given or [last["content"]])
