"""`lora eval`: scores of a base, an adapter and the merged model, side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LoraError
from .answering import (
    Adapter,
    BatchSize,
    Dtype,
    Model,
    Quantize,
    check_target,
    known_labels,
    load_answering,
    progress,
    write_lines,
)

if TYPE_CHECKING:
    from ..evaluation.columns import Measured
    from ..evaluation.sets import EvalSet

_Data = Annotated[str | None, typer.Option(help="Rows with answers, in any format that `lora train` reads.")]
_Task = Annotated[
    str | None, typer.Option(help="FinLoRA's tasks, with commas between: tfns, fiqa, fpb, nwgi, ner, ...")
]
_TaskDir = Annotated[Path | None, typer.Option(help="Folder of FinLoRA's test files.")]
_LmEval = Annotated[str | None, typer.Option("--lm-eval", help="Tasks of lm-eval, with commas between, by lm-eval.")]
_Metrics = Annotated[
    str | None,
    typer.Option(
        help="For --data: perplexity, bleu, rouge_l, exact (these four unless given); accuracy, f1, no_label."
    ),
]
_Limit = Annotated[int | None, typer.Option(min=1, help="Take so many rows of each, from all over.")]
_Merged = Annotated[bool, typer.Option("--merged", help="Measure the merged model as well.")]
_Longest = Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens [default: 128, or the task's].")]
_Answers = Annotated[Path | None, typer.Option(help="Where each row goes as .jsonl, with what each column answered.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")]


def evaluate(
    model: Model,
    adapter: Adapter = None,
    data: _Data = None,
    task: _Task = None,
    task_dir: _TaskDir = None,
    lm_eval: _LmEval = None,
    metrics: _Metrics = None,
    limit: _Limit = None,
    merged: _Merged = False,
    max_new_tokens: _Longest = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    answers: _Answers = None,
    as_json: _Json = False,
) -> None:
    """Score a model's answers to rows: the base, the adapter and, with --merged, the merged model in one table.

    Prompts are rendered exactly as in training. Labels are scored as FinLoRA does, by the first one in an answer,
    beside what the most frequent label alone would have.

        lora eval org/base --adapter my-adapter --data rows.jsonl
    """
    _check(data, task, task_dir, lm_eval, metrics, answers)
    check_target("answers", answers, {"data": data, "task_dir": task_dir, "model": model, "adapter": adapter})

    from ..evaluation import classifiers, columns, harness, report
    from ..train.record import run_record
    from .console import clean_warnings

    names = columns.columns(adapter is not None, merged)
    if lm_eval is not None:
        harness.check_harness()
    labels = known_labels(adapter, classifiers.labels_of(model, run_record(adapter or model)))
    sets = _sets(data, task, task_dir, metrics, limit, max_new_tokens, labels)
    if labels:
        import torch

        torch.manual_seed(0)  # a head that is fresh is the same on each call
    base, tokenizer = load_answering(model, adapter, dtype, quantize, labels)
    with clean_warnings(), progress(sum(len(each.prompts or each.rows) for each in sets) * len(names)) as advance:
        measure_one = _measure(base, tokenizer, model, adapter, batch_size, advance)
        found = report.Report(names, columns.side_by_side(base, names, sets, measure_one))
        if lm_eval is not None:
            found.more = harness.side_by_side(base, tokenizer, names, lm_eval.split(","), batch_size, limit)
    if answers is not None:
        write_lines(answers, found.answers())
        typer.echo(f"answers: {answers}", err=True)
    typer.echo(found.to_json() if as_json else str(found))


def _check(
    data: str | None, task: str | None, task_dir: Path | None, lm_eval: str | None, metrics: str | None,
    answers: Path | None,
) -> None:  # fmt: skip
    if sum(given is not None for given in (data, task, lm_eval)) != 1:
        raise LoraError("give one of --data FILE, --task NAMES and --lm-eval TASKS")
    if (task is None) != (task_dir is None):
        raise LoraError("--task and --task-dir go together: --task tfns,fiqa --task-dir FinLoRA/data/test")
    if metrics is not None and data is None:
        raise LoraError("--metrics goes with --data; a task has its own")
    if answers is not None and lm_eval is not None:
        raise LoraError("--answers does not go with --lm-eval, which keeps its answers")


def _sets(
    data: str | None, task: str | None, task_dir: Path | None, metrics: str | None, limit: int | None,
    max_new_tokens: int | None, labels: list[str],
) -> "list[EvalSet]":  # fmt: skip
    from ..data.rows import read_rows
    from ..evaluation import classifiers, sets, tasks

    if labels and data is None:
        raise LoraError("the model is a classifier, which is measured on --data with its labels")
    if data is not None and labels:
        return [classifiers.class_set(read_rows(data), labels, limit)]
    if data is not None:
        wanted = [metric for part in (metrics or "").split(",") if (metric := part.strip())]
        return [sets.data_set(read_rows(data), wanted, limit, max_new_tokens)]
    if task is not None and task_dir is not None:
        return [sets.task_set(one, task_dir, limit, max_new_tokens) for one in tasks.find_tasks(task)]
    return []


def _measure(
    base: Any, tokenizer: Any, model: str, adapter: Path | None, batch_size: int, advance: Callable[[int], None]
) -> "Callable[[EvalSet, str], Measured]":
    """What measures one set in one column: the labels of a classifier, or the answers of any other model."""
    from ..evaluation import classifiers, columns
    from ..train.classify import stored_labels
    from ..train.record import style_as_trained

    style = style_as_trained(adapter or model)
    fresh = not stored_labels(model)

    def measure_one(given: "EvalSet", column: str) -> "Measured":
        if given.prompts or not given.prompt_of:
            return columns.measure(base, tokenizer, given, style=style, batch_size=batch_size, on_batch=advance)
        return classifiers.measure_classes(
            base, tokenizer, model, given, batch_size=batch_size, fresh=fresh and column == columns.BASE,
            on_batch=advance,
        )  # fmt: skip

    return measure_one
