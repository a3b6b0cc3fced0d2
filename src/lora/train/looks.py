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
        self.watch = Watch(console, recipe.log_every)
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

    def close(self) -> None:
        """To be called however the training ended."""
        self.watch.stop()
        if self.metrics is not None:
            self.metrics.journal.close()
        if self.evaluations is not None:
            self.evaluations.close()

    def numbers(self, model: Any) -> dict[str, float]:
        """The metrics of a run's result."""
        watch = self.watch
        found: dict[str, float] = {
            "loss": watch.recent_loss, "seconds": round(watch.seconds, 3), "tokens": watch.tokens,
            "tokens_per_second": round(watch.tokens_per_second, 1), "steps": watch.steps,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }  # fmt: skip
        if watch.eval_loss is not None:
            found["eval_loss"] = watch.eval_loss
        return found
