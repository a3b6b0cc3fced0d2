"""What looks at a run while it runs: the watch, the journal of its numbers, the evaluations, the trackers."""

from typing import Any

from rich.console import Console

from .evaluations import Evaluations
from .labelled import held_out_of
from .length import Length
from .metrics import Metrics
from .place import Place
from .recipe import Recipe
from .rows import RunRows
from .steps import RunCallback
from .trackers import Trackers
from .watch import Watch


class Looks:
    """The callbacks that a run is told by, in their order; `kept` are those that a checkpoint keeps the state of."""

    def __init__(self, recipe: Recipe, where: Place, console: Console) -> None:
        self.where, self.console = where, console
        self.watch = Watch(console, recipe.log_every, "rows" if recipe.task == "classify" else "tokens")
        self.evaluations: Evaluations | None = None
        self.metrics: Metrics | None = None
        self.callbacks: list[RunCallback] = [self.watch]

    def open(self, recipe: Recipe, rows: RunRows, length: Length, pad: int, after: int) -> None:
        """Makes the rest, once the rows are known. after: the step that the run goes on from."""
        live = self.where.live
        self.metrics = Metrics(live, self.watch, after)
        self.callbacks.append(self.metrics)
        told = [self.metrics.evaluated]
        if recipe.track:
            trackers = Trackers(recipe.track, self.where.out, self.where.out.name, self.watch)
            self.callbacks.append(trackers)
            told.append(trackers.evaluated)
        held_out: Any = held_out_of(recipe, rows, pad)
        if held_out is not None:
            every = recipe.eval_every or length.per_pass
            self.evaluations = Evaluations(held_out, every, recipe.early_stop, self.watch, live, after, told)
            self.callbacks.append(self.evaluations)

    @property
    def kept(self) -> list[RunCallback]:
        return [each for each in self.callbacks if isinstance(each, (Watch, Evaluations))]

    @property
    def best_step(self) -> int:
        """The step whose evaluation is the best so far; 0 for none."""
        return self.evaluations.best_step if self.evaluations is not None else 0

    def saved_loss(self, step: int) -> float | None:
        """The held-out loss of the adapter that is saved, that of `step`: of the best one, or of the last."""
        if self.evaluations is not None and step == self.evaluations.best_step > 0:
            return self.evaluations.best_loss
        return self.watch.eval_loss

    def steps(self, saved: int) -> dict[str, int]:
        """What the record says of the best step and of the one whose adapter is saved, where there was any judging."""
        return {"best_step": self.best_step, "adapter_step": saved} if self.best_step else {}

    def worse_than_base(self, step: int) -> str | None:
        """What to say where the adapter of `step` does worse on the held-out rows than no adapter; None where not."""
        loss = self.saved_loss(step)
        base = None if self.evaluations is None else self.evaluations.base_loss
        if loss is None or base is None or loss <= base:
            return None
        return (
            f"the adapter is worse than the base on the held-out rows: eval loss {loss:.4f} after step {step:,}, and "
            f"{base:.4f} before training; lower lr, or train shorter"
        )

    def close(self) -> None:
        """To be called however the training ended."""
        self.watch.stop()
        if self.metrics is not None:
            self.metrics.journal.close()
        if self.evaluations is not None:
            self.evaluations.close()

    def numbers(self, model: Any, step: int) -> dict[str, float]:
        """The metrics of a run's result; `step` is the one whose adapter is saved."""
        watch = self.watch
        found: dict[str, float] = {
            "loss": watch.recent_loss, "seconds": round(watch.seconds, 3),
            "paused_seconds": round(watch.paused_seconds, 3), "tokens": watch.tokens,
            "tokens_per_second": round(watch.tokens_per_second, 1), "steps": watch.steps,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }  # fmt: skip
        if (loss := self.saved_loss(step)) is not None:
            found["eval_loss"] = loss
        return found
