"""report.md: a run on one page, made from what lies in its adapter's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..files.commit import replaced
from .finished import Finished, check_folder
from .markdown import cell, number, table

REPORT_FILE = "report.md"
_EVALUATIONS, _SAMPLES = 12, 10  # evaluations whose samples are shown, and the samples of each
_LONGEST = 400  # characters of a prompt or an answer
Each = TypeVar("Each")


def write(folder: Path) -> None:
    """Writes the page beside the adapter. Raises `LoraError` where no run has ended there."""
    text = page(folder)
    with replaced(folder / REPORT_FILE) as file:
        file.write_text(text, encoding="utf-8")


def page(folder: Path) -> str:
    """The page as Markdown. No answer of a model, whatever it holds, breaks it."""
    check_folder(folder)
    run = Finished.read(folder)
    parts = [
        f"# {cell(folder.resolve().name)}",
        _trained(run), *_outcome(run), *_curve(run), *_evaluations(run), *_samples(run),
        "## Cost", table(["", ""], [*run.course(), *run.costs()]),
        "## Settings", "As they ran; `recipe.yaml` has the same and runs again.", _settings(run),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _trained(run: Finished) -> str:
    recipe, record = run.recipe, run.record
    rows = [
        ["base", cell(recipe.get("model"), 1000)],
        ["quantization of the base", cell(run.quantization)],
        ["its dtype", cell(record.get("dtype", "-"))],
        *run.adapter_rows,
        ["template", cell(record.get("template") or recipe.get("template"))],
        ["data", cell(recipe.get("data"), 1000)],
        ["rows", _rows(record)],
        ["held out", _held_out(recipe)],
    ]
    if record.get("labels"):
        rows.append(["labels", cell(", ".join(map(str, record["labels"])), 1000)])
    return table(["", ""], rows)


def _rows(record: dict[str, Any]) -> str:
    left_out = record.get("rows_too_long")
    too_long = (
        f"; {number(left_out)} longer than {number(record.get('max_length'))} tokens left out" if left_out else ""
    )
    return f"{number(record.get('rows'))} ({cell(record.get('format', '-'))}){too_long}"


def _held_out(recipe: dict[str, Any]) -> str:
    if recipe.get("eval_data"):
        return cell(recipe["eval_data"], 1000)
    return f"{recipe['eval_share']:.1%} of the rows" if recipe.get("eval_share") else "none"


def _outcome(run: Finished) -> list[str]:
    lines = [[cell(text, 1000) for text in line] for line in run.checks]
    return ["## Did it work?", table(["check", "verdict", "what was found"], lines)] if lines else []


def _curve(run: Finished) -> list[str]:
    from .picture import PICTURE_FILE

    shown = [f"![losses and learning rate by step]({PICTURE_FILE})"] if (run.folder / PICTURE_FILE).is_file() else []
    return ["## Curve", *shown] if shown else []


def _evaluations(run: Finished) -> list[str]:
    if not run.evaluations:
        return []
    names = list(dict.fromkeys(name for each in run.evaluations for name in each if name != "step"))
    rows = [
        [f"{each['step']:,}{' (best)' if each is run.best else ''}", *(number(each.get(name)) for name in names)]
        for each in run.evaluations
    ]
    note = "Step 0 is the base, before training." if run.evaluations[0]["step"] == 0 else ""
    return ["## Evaluations", *([note] if note else []), table(["step", *map(cell, names)], rows)]


def _samples(run: Finished) -> list[str]:
    steps = list(dict.fromkeys(each["step"] for each in run.samples))
    shown, parts = _some(steps, _EVALUATIONS), list[str]()
    cut = len(shown) < len(steps)
    for step in shown:
        own = [each for each in run.samples if each["step"] == step]
        rows = [
            [*(cell(each.get(name, ""), _LONGEST) for name in ("prompt", "reference", "answer")), _end(each)]
            for each in own[:_SAMPLES]
        ]
        cut |= len(own) > _SAMPLES
        parts += [f"### Step {step:,}", table(["prompt", "reference", "answer", "ended"], rows)]
    note = ["These are some of them; `samples.jsonl` has all."] if cut else []
    return ["## Samples", *note, *parts] if parts else []


def _end(sample: dict[str, Any]) -> str:
    if "stopped" not in sample:
        return "-"
    return "by itself" if sample["stopped"] else "cut: it did not stop"


def _some(all_of: Sequence[Each], most: int) -> list[Each]:
    """At most so many, the first and the last among them."""
    if len(all_of) <= most:
        return list(all_of)
    return [all_of[place * (len(all_of) - 1) // (most - 1)] for place in range(most)]


def _settings(run: Finished) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "none"
        return str(value)

    return table(["setting", "value"], [[cell(k), cell(shown(v), 1000)] for k, v in run.recipe.items()])
