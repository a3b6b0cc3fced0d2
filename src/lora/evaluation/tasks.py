"""FinLoRA's tasks by name: their files, how long an answer is, and how it is scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.rows import Row, read_rows
from ..data.sound import all_told
from ..errors import DataError, LoraError, near

TEXT = ("perplexity", "bleu", "rouge_l", "exact")
LABELS = ("accuracy", "f1", "no_label")
METRICS = {
    "perplexity": "exp of the mean loss of an answer's token",
    "bleu": "sacrebleu's BLEU",
    "rouge_l": "ROUGE-L, F1",
    "exact": "answers that are a reference, per cent",
    "accuracy": "answers whose first label is right, per cent",
    "f1": "F1 of the labels, weighted by their rows, per cent",
    "no_label": "answers that name no label, per cent",
}
_SENTIMENT = ("negative", "neutral", "positive")
_DEGREES = tuple(f"{how} {side}" for side in ("negative", "positive") for how in ("strong", "moderately", "mildly"))


@dataclass(frozen=True)
class Task:
    """One task: rows `{"context", "target"}` in `file`.

    labels: all that there are, where they are few; empty takes the targets of the whole file, as FinLoRA does.
    joined: an answer holds several labels with commas between, each scored on its own.
    """

    name: str
    file: str
    max_new_tokens: int
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = LABELS
    joined: bool = False


# Names, files and lengths as in FinLoRA's test/test_dataset.py.
TASKS = {
    task.name: task
    for task in (
        Task("tfns", "tfns_test.jsonl", 10, _SENTIMENT),
        Task("fiqa", "fiqa_test.jsonl", 10, _SENTIMENT),
        Task("fpb", "fpb_test.jsonl", 10, _SENTIMENT),
        Task("nwgi", "nwgi_test.jsonl", 10, (*_DEGREES, "neutral")),
        Task("ner", "ner_test.jsonl", 10, ("location", "organization", "person")),
        Task("headline", "headline_test.jsonl", 10),
        Task("formula", "formula_test.jsonl", 50),
        Task("xbrl_finer", "finer_test_batched.jsonl", 100, joined=True),
        Task("xbrl_fnxl", "fnxl_test_batched.jsonl", 100, joined=True),
        Task("xbrl_tags_extract", "xbrl_extract_tags_test.jsonl", 20),
        Task("xbrl_value_extract", "xbrl_extract_value_test.jsonl", 20),
        Task("xbrl_formula_extract", "xbrl_extract_formula_test.jsonl", 30),
        Task("xbrl_formula_calc_extract", "xbrl_extract_formula_calculations_test.jsonl", 30),
        # FinLoRA scores these two by BERTScore, whose model is a download of its own.
        Task("xbrl_term", "xbrl_term_test.jsonl", 50, metrics=TEXT),
        Task("financebench", "financebench_test.jsonl", 50, metrics=TEXT),
    )
}
_OTHER_NAMES = {
    "finer": "xbrl_finer", "fnxl": "xbrl_fnxl", "xbrl_tag_extract": "xbrl_tags_extract",
    "formula_calculations": "xbrl_formula_calc_extract",
}  # fmt: skip
_GROUPS = {"sentiment": ("fpb", "fiqa", "tfns", "nwgi")}


def find_tasks(names: str) -> list[Task]:
    """The tasks of `name,name`; `sentiment` is four of them. Raises `LoraError` for a name that is none."""
    found: dict[str, Task] = {}
    for given in filter(None, (part.strip() for part in names.split(","))):
        for name in _GROUPS.get(given, (_OTHER_NAMES.get(given, given),)):
            if name not in TASKS:
                raise LoraError(f"task: there is no task {given!r}{near(given, [*TASKS, *_OTHER_NAMES, *_GROUPS])}")
            found[name] = TASKS[name]
    if not found:
        raise LoraError(f"task is {names!r}; give one of {', '.join(TASKS)}, or several with commas between")
    return list(found.values())


def read_task(task: Task, folder: Path) -> list[Row]:
    """The rows of a task's file in `folder`, or in its `test` or `data/test` as FinLoRA lays them.

    Raises:
        DataError: the file is nowhere there, or a row has no context or target.
    """
    places = [folder / task.file, folder / "test" / task.file, folder / "data" / "test" / task.file]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(
            f"task_dir: {str(folder)!r} has no {task.file}, which task {task.name!r} reads; give the folder of "
            "FinLoRA's test files (its data/test)"
        )
    rows = read_rows(path, f"task {task.name}")
    faults = [
        f"row {number} of {str(path)!r} lacks context or target"
        for number, row in enumerate(rows, 1) if "context" not in row or "target" not in row
    ]  # fmt: skip
    if faults:
        raise DataError(f"task {task.name}: {all_told(faults, 'cannot be measured')}")
    # Some files have numbers as targets.
    return [{**row, "target": str(row["target"])} for row in rows]


def spread(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """`limit` of the rows at equal steps: some files are sorted by label, so that the first few have one alone."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]
