"""Evaluations on the way: the loss on held-out rows, samples of answers, which step was the best, when to stop.

Measuring changes nothing: no random number is drawn, and each module keeps its mode. So a run is the same, to the bit,
however often it is measured.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerState

from ..data.collate import PaddingCollator
from ..data.encode import Encoded
from ..data.template import PromptTemplate
from ..errors import OutOfMemoryError
from .answers import Question, answers, question
from .losses import held_out_loss
from .metrics import Journal
from .steps import RunCallback
from .watch import Watch

SAMPLES_FILE = "samples.jsonl"
_LONGEST_SAMPLE = 128  # tokens of an answer in the report, and of a plain text that is gone on with
T = TypeVar("T")


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows of answers or texts, and how they are measured.

    batch_size: rows in a forward pass; halved for good where they do not fit into the memory.
    samples: how many rows are answered at each evaluation.
    """

    rows: Sequence[Encoded]
    template: PromptTemplate
    batch_size: int
    samples: int

    def measure(self, model: Any) -> dict[str, float]:
        """`eval_loss`: the mean over all trained tokens of the rows."""
        return {"eval_loss": self._loss(model, self.batch_size)}

    def _loss(self, model: Any, batch_size: int) -> float:
        # The padding is masked, so its id does not matter; 0 is in every vocabulary.
        collate = PaddingCollator(self.template.tokenizer.pad_token_id or 0)
        rows = sorted(self.rows, key=lambda row: len(row["input_ids"]))  # less padding
        try:
            return held_out_loss(model, (collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)))
        except torch.OutOfMemoryError as error:
            if batch_size == 1:
                raise OutOfMemoryError(
                    "an evaluation did not fit into the memory, one row at a time; lower max_length, or shorten the "
                    "held-out rows"
                ) from error
        torch.cuda.empty_cache()
        return self._loss(model, batch_size // 2)  # a mean over tokens is the same in any batches

    def sampled(self, model: Any) -> list[dict[str, Any]]:
        """Answers to `samples` rows, spread over all: `prompt`, `reference`, `answer` and `stopped`."""
        asked = [question(row) for row in spread(self.rows, self.samples)]
        given = answers(model, self.template, asked, _longest(asked), max(1, self.batch_size))
        return [
            {
                "sample": number, "prompt": self._text(q.prompt), "reference": self._text(q.reference),
                "answer": self._text(a.ids), "stopped": a.stopped,
            }
            for number, (q, a) in enumerate(zip(asked, given, strict=True), 1)
        ]  # fmt: skip

    def _text(self, ids: list[int]) -> str:
        return str(self.template.tokenizer.decode(ids, skip_special_tokens=True)).strip()


class Evaluations(RunCallback):
    """Evaluates before the first step, every few steps and after the last one.

    Args:
        held_out: what to measure; anything with its `measure` and `sampled`.
        every: steps between two evaluations.
        patience: stop the run after so many evaluations in a row that did not better the loss; None: never.
        watch: is told of each evaluation, and does not count its time as the training's.
        folder: where the samples go, as samples.jsonl.
        after: the step of the checkpoint that the run goes on from; 0 for a fresh run.
        told: called with the numbers of each evaluation, `step` and `eval_loss` among them.
    """

    def __init__(
        self, held_out: HeldOut, every: int, patience: int | None, watch: Watch, folder: Path, after: int = 0,
        told: Sequence[Callable[[Mapping[str, Any]], None]] = (),
    ) -> None:  # fmt: skip
        self.held_out, self.every, self.patience, self.watch, self.told = held_out, every, patience, watch, told
        self.best_step, self.best_loss = 0, math.inf  # of the steps that trained
        self.base_loss: float | None = None  # before the first of them
        self.stopped_early = False
        self._worse = 0  # evaluations in a row
        self._after, self._samples = after, Journal(folder / SAMPLES_FILE)

    def state(self) -> dict[str, Any]:
        return {
            "best_step": self.best_step, "best_loss": _number(self.best_loss), "worse": self._worse,
            "base_loss": _number(self.base_loss),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        if state:  # else the checkpoint is of a run without evaluations
            self.best_step, self._worse = state["best_step"], state["worse"]
            self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
            self.base_loss = state.get("base_loss")

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._samples.open(self._after)
        if state.global_step == 0:
            self.base_loss = _number(self._evaluate(kwargs["model"], 0, ": the base, before training"))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.every and step != state.max_steps:
            return
        loss = self._evaluate(kwargs["model"], step)
        if self.patience is not None and self._worse >= self.patience and step < state.max_steps:
            self.stopped_early = control.should_training_stop = True
            self.watch.say(
                f"step {step:,}: stopped early, since the loss on the held-out rows is no better than at step "
                f"{self.best_step:,} ({self.best_loss:.4f}, now {loss:.4f}){self._beside_base(self.best_loss)}"
            )

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """To be called however the training ended."""
        self._samples.close()

    def _evaluate(self, model: Any, step: int, note: str = "") -> float:
        begun = time.perf_counter()
        with self.watch.paused("evaluating on held-out rows"):
            measured = self.held_out.measure(model)
            samples = self.held_out.sampled(model)
        loss = measured["eval_loss"]
        if step:
            note = self._judged(loss, step)
        self.watch.evaluated(step, loss, note)
        numbers = {"step": step, **measured, "eval_seconds": round(time.perf_counter() - begun, 3)}
        for tell in self.told:
            tell(numbers)
        for sample in samples:
            self._samples.write({"step": step, **sample})
        return loss

    def _judged(self, loss: float, step: int) -> str:
        """Keeps the best step, and says where even the base is better. The base is no step that could be kept, nor one
        to be patient from: while the rate warms up a run may be worse than it for a while."""
        beside = self._beside_base(loss)
        if loss < self.best_loss:
            self.best_step, self.best_loss, self._worse = step, loss, 0
            return beside or ", the best so far"
        self._worse += 1
        return f", the best was {self.best_loss:.4f} at step {self.best_step:,}{beside}"

    def _beside_base(self, loss: float) -> str:
        if self.base_loss is None or loss < self.base_loss:
            return ""
        return f", {'no better' if loss == self.base_loss else 'worse'} than the base ({self.base_loss:.4f})"


def _number(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def spread(rows: Sequence[T], count: int) -> list[T]:
    """`count` of the rows at even distances, or all of them."""
    count = min(count, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def _longest(asked: Sequence[Question]) -> int:
    """Room for twice the longest reference, so that an answer that does not stop is seen, and no more."""
    return min(_LONGEST_SAMPLE, max((2 * len(q.reference) + 8 for q in asked), default=1))
