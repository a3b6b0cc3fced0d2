"""A finished run, by what lies in its adapter's folder: what the report and the card are made from."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..errors import LoraError
from ..files.header import CONFIG_FILE
from ..files.prompts import words
from .display import size
from .markdown import cell, number
from .recipe import RECIPE_FILE
from .recipe_file import read_mapping
from .record import run_record


@dataclass(frozen=True)
class Finished:
    """What the files say; empty for a file that is not there.

    recipe: as it ran. record: run.json. adapter: the adapter's settings, in PEFT's words. steps, evaluations, samples:
    lines of the journals.
    """

    folder: Path
    recipe: dict[str, Any]
    record: dict[str, Any]
    adapter: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Finished":
        """Raises `LoraError` where one of the files is not what it should be."""
        from .evaluations import SAMPLES_FILE  # with torch, which a run that ends has loaded
        from .metrics import METRICS_FILE, read

        lines = read(folder / METRICS_FILE)
        return cls(
            folder, _mapping(folder / RECIPE_FILE), run_record(folder), _mapping(folder / CONFIG_FILE),
            [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line],
            read(folder / SAMPLES_FILE),
        )  # fmt: skip

    @property
    def figures(self) -> dict[str, Any]:
        """The run's numbers, `metrics` of its record."""
        return _dict(self.record.get("metrics"))

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation of least loss; what was measured before the first step counts only where it is alone."""
        known = [each for each in self.evaluations if isinstance(each["eval_loss"], (int, float))]
        trained = [each for each in known if each["step"]]
        return min(trained or known, key=lambda each: float(each["eval_loss"]), default=None)

    @property
    def targets(self) -> str:
        """What the recipe names, with what that came to in this base."""
        asked, found = self.recipe.get("targets"), self.adapter.get("target_modules")
        names = ", ".join(map(str, found)) if isinstance(found, list) else str(found or "")
        said = ", ".join(map(str, asked)) if isinstance(asked, list) else str(asked or names)
        return said if not names or said == names else f"{said} ({names})"

    @property
    def prompts(self) -> str:
        """What of a LLaMA-Adapter was trained, in words; "" for another adapter."""
        known = self.adapter if self.adapter.get("peft_type") == "ADAPTION_PROMPT" else {}
        return words(known, CONFIG_FILE) if known else ""

    @property
    def adapter_rows(self) -> list[list[str]]:
        """Rows of two cells: what was trained."""
        if self.prompts:
            return [["adapter", cell(self.prompts, 1000)], ["in", cell(self.adapter.get("target_modules"), 1000)]]
        sizes = f"{number(self.recipe.get('r'))}, {cell(self.recipe.get('alpha'))}"
        return [["targets", cell(self.targets, 1000)], ["r, alpha", sizes]]

    @property
    def quantization(self) -> str:
        return str(self.record.get("quantisation") or "none")

    @property
    def checks(self) -> list[list[str]]:
        """The lines of the check at the end: name, verdict, text; none where there was no check."""
        lines = _dict(self.record.get("outcome")).get("lines")
        known = [_dict(line) for line in lines] if isinstance(lines, list) else []
        return [[str(line.get(key, "")) for key in ("name", "verdict", "text")] for line in known]

    def course(self) -> list[list[str]]:
        """Rows of two cells: how long the run took, and how its losses went."""
        figures, lengths = self.figures, _dict(self.record.get("length"))
        rows = [["steps", number(figures.get("steps", lengths.get("steps")))]]
        losses = [each["loss"] for each in self.steps if each["loss"] is not None]
        if losses:
            rows.append(["training loss", f"{number(losses[0])} at the first step, {number(losses[-1])} at the last"])
        if (best := self.best) is not None:
            first = self.evaluations[0]
            before = f"{number(first['eval_loss'])} before training, " if first["step"] == 0 != best["step"] else ""
            rows.append(["loss on held-out rows", f"{before}{number(best['eval_loss'])} at step {best['step']:,}"])
        rows.append(["trained parameters", number(figures.get("trainable_parameters"))])
        rows.append(["tokens", number(figures.get("tokens"))])
        if isinstance(seconds := figures.get("seconds"), (int, float)):
            pace = f" ({number(figures.get('tokens_per_second'), 1)} tokens/s)"
            rows.append(["time of the steps", f"{timedelta(seconds=round(seconds))}{pace}"])
        return rows

    def costs(self) -> list[list[str]]:
        """Rows of two cells: what else the run took, and what it left out."""
        rows = []
        evaluating = sum(float(each.get("eval_seconds") or 0) for each in self.evaluations)
        if evaluating:
            rows.append(["time of the evaluations", str(timedelta(seconds=round(evaluating)))])
        checking = _dict(self.record.get("outcome")).get("seconds")
        if isinstance(checking, (int, float)):
            rows.append(["time of the check", str(timedelta(seconds=round(checking)))])
        memory = [each["memory"] for each in self.steps if isinstance(each.get("memory"), int)]
        if memory:
            rows.append(["most memory", size(max(memory))])
        rows.append(["skipped steps", number(self.record.get("skipped_steps", 0))])
        if "micro_batch" in self.record:
            rows.append(["rows in a forward pass, at the end", number(self.record["micro_batch"])])
        if self.record.get("stopped"):
            rows.append(["stopped", cell(self.record["stopped"])])
        return rows


def _mapping(path: Path) -> dict[str, Any]:
    return read_mapping(path, path.name) if path.is_file() else {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def check_folder(folder: Path) -> None:
    """Raises `LoraError` where no run has written."""
    if not (folder / RECIPE_FILE).is_file():
        raise LoraError(f"out: {str(folder)!r} has no {RECIPE_FILE}, so no run of `lora train` has ended there")
