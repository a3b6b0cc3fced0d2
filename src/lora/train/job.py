"""The order of a run: place, needs, rows, model, training, and what is written at the end."""

import secrets
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

import lora

from ..errors import LoraError, LoraWarning, NonFiniteError, OutOfMemoryError, Stopped
from . import finish, place, resume
from .adapted import adapted, collator
from .base import check_quantization, load_tokenizer, pick_dtype
from .base_facts import BaseFacts, read_facts
from .checkpoints import Checkpoints, Identity
from .checks import check_held_out
from .defaults import doubts, resolved
from .feed import Feed, digest
from .fit import largest_batch
from .guard import Guard
from .leaks import check_packing
from .length import Length
from .looks import Looks
from .memory_retry import ADVICE, SMALLER, MicroBatches, out_of_memory, told_apart
from .needs import check_needs
from .outcome import Outcome
from .quiet import quiet
from .recipe import RECIPE_FILE, Recipe
from .rows import RunRows, run_rows
from .signals import Signals, StopAtStep, resume_command
from .trackers import check_trackers
from .trainer import LoraTrainer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """Where the adapter lies, and the run's numbers.

    metrics: `loss` (mean of the last `log_every` steps), `seconds`, `tokens`, `tokens_per_second`, `steps`,
    `trainable_parameters`, and `eval_loss` when there were held-out rows. lines: what else there is to tell.
    """

    out: Path
    metrics: dict[str, float]
    lines: list[str] = field(default_factory=list)


def run(
    recipe: Recipe, *, force: bool = False, resume: str = "none", resume_without: Sequence[str] = (),
    console: Console | None = None,
) -> Result:  # fmt: skip
    """Trains an adapter as the recipe says and saves it, with the recipe and the run's numbers beside it.

    The adapter is written once, at the end. On the way, what a resume needs is saved in `<out>/checkpoints`, also when
    the run is interrupted, runs out of memory, or meets losses that are not finite.

    Args:
        recipe: what to do.
        force: replace an adapter that is already in `recipe.out`, once the new one is finished.
        resume: "auto" goes on from the newest whole checkpoint in `recipe.out`; a checkpoint's folder from that one.
        resume_without: parts of it that may be missing: "optimizer", "scheduler", "random", "metrics".
        console: where to show progress; None shows nothing, and what must be known is a warning.

    Raises:
        LoraError: anything wrong with the model, the data or the settings, before the first step.
        NonFiniteError: the loss or its gradient was NaN or infinite, `max_bad_steps` times in a row.
        OutOfMemoryError: not even one row at a time fits into memory.
        CheckError: the run has changed nothing (then nothing is saved), or its adapter did not pass the check.
        Stopped: a `KeyboardInterrupt`: Ctrl-C, SIGTERM or SIGHUP.
    """
    check_held_out(recipe)
    signals = Signals()
    with signals.listening(), place.taken(Path(recipe.out), force, resume) as where:
        return _finished(where, resume) or _Job(recipe, where, signals, force, console).run(resume, resume_without)


class _Job:
    """One run, from its needs to its record."""

    def __init__(
        self, recipe: Recipe, where: place.Place, signals: Signals, force: bool, console: Console | None
    ) -> None:
        self.recipe, self.where, self.signals, self.force = recipe, where, signals, force
        self.looks = Looks(recipe, where, console or Console(quiet=True))
        self.say: Say = _warn if console is None else self.looks.watch.say
        self.found: list[str] = []  # what is told once nothing that stops the run is left: errors come first

    def run(self, wanted: str, without: Sequence[str]) -> Result:
        facts = read_facts(self.recipe.model)
        self.recipe = recipe = self._decided(facts)
        check_needs(recipe)
        check_trackers(recipe.track)
        check_quantization(recipe.model, recipe.quantize)
        found = resume.find(self.where, wanted, without, self.say)
        resume.check_replaces(found, self.where, self.force)
        transformers.set_seed(recipe.seed)
        rows = run_rows(recipe, load_tokenizer(recipe.model), self.found.append)
        self.recipe = _fitted(self.recipe, rows, found, self.found)
        self.recipe = recipe = self._decided(facts, len(rows.items))
        length = Length.of(recipe, len(rows.items))
        dtype, data = str(pick_dtype(recipe.dtype)).removeprefix("torch."), digest(rows.items)
        held_out = digest(rows.measured) if rows.measured else None
        if found is not None:
            resume.compare(found, recipe, data, held_out, dtype)
        with told_apart("before the first step: the base does not fit, with its adapter, where it trains"):
            model = adapted(recipe, rows.names, rows.tokenizer)
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        _each(self.found, self.looks.watch.say)
        _each(doubts(recipe, rows.encoded.trained, trains), self.say)
        identity = found.identity if found is not None else Identity(
            secrets.token_hex(8), time.time(), self.force, data, held_out, dtype, finish.trained_digest(model)
        )  # fmt: skip
        trainer, saver = self._trainer(model, rows, length, identity, found)
        if recipe.packing:
            check_packing(model)  # where Trainer has moved it: flash attention runs on a GPU alone
        if found is not None and resume.is_over(found):
            resume.restore_counts(found, trainer, self.looks.kept)
        else:
            self._train(trainer, saver)
        return self._finish(trainer, saver, rows)

    def _decided(self, facts: BaseFacts | None, rows: int | None = None) -> Recipe:
        """The recipe with the defaults that can be told by now, each to be said with its reason."""
        decided = resolved(self.recipe, facts, rows)
        self.found += [f"default {choice}" for choice in decided.choices]
        return decided.recipe

    def _trainer(
        self, model: Any, rows: RunRows, length: Length, identity: Identity, found: resume.Found | None
    ) -> tuple[LoraTrainer, Checkpoints]:
        recipe, looks = self.recipe, self.looks
        looks.open(recipe, rows, length, rows.tokenizer.pad_token_id or 0, found.step if found is not None else 0)
        stopping = StopAtStep(self.signals)
        saver = Checkpoints(
            self.where, recipe, identity, looks.kept, lambda: self.signals.received > 0, lambda: looks.best_step,
            looks.watch.paused,
        )  # fmt: skip
        size = recipe.batch_size * recipe.grad_accum
        feed = Feed(rows.items, size, length.steps, recipe.seed, recipe.group_by_length)
        with quiet(), told_apart("before the first step: the base does not fit where it trains"):
            trainer = LoraTrainer(
                model, recipe, length, feed, collator(recipe, model, rows), folder=self.where.checkpoints,
                micro=MicroBatches(recipe.batch_size, say=self.say), guard=Guard(recipe.max_bad_steps, self.say),
                callbacks=[*looks.callbacks, stopping, saver],
            )  # fmt: skip
        saver.trainer = trainer
        if found is not None:
            resume.restore_adapter(found.folder, model)
            resume.restore_metrics(found, self.where)
            saver.newest = found.folder
            trainer.on_begin = lambda: resume.restore_run(found, trainer, looks.kept)
            self.say(f"resume: from {str(found.folder)!r}, after step {found.step} of {length.steps}")
        return trainer, saver

    def _train(self, trainer: LoraTrainer, saver: Checkpoints) -> None:
        model = trainer.model
        use_cache = getattr(model.config, "use_cache", None)
        # Trainer has moved the model to where it trains, so that the summary tells how it will run there.
        self.looks.console.print(str(lora.summary(model)), highlight=False, soft_wrap=True)
        try:
            with quiet(), self.signals.waiting():
                trainer.train()
        except Stopped:  # pressed until it stopped at once
            raise self.signals.stopped(_newest(saver)) from None
        except (NonFiniteError, OutOfMemoryError) as error:
            kept = self._kept(saver, trainer)
            if not isinstance(error, NonFiniteError):
                raise OutOfMemoryError(f"{error}. {kept}") from error
            self.where.ended(saver.identity.run, str(error))
            advice = "Lower lr, lengthen the warm-up, or look for broken rows"
            raise NonFiniteError(f"{error}. {kept}. {advice}", error.step) from error
        except (RuntimeError, MemoryError) as error:  # of the optimizer or of an evaluation: not to be halved
            if not out_of_memory(error):
                raise
            raise _no_room(error, trainer.state.global_step + 1, saver) from error
        finally:
            self.looks.close()
            model.config.use_cache = use_cache  # Trainer turns the cache off for good
            model.eval()
        if self.signals.received:
            raise self.signals.stopped(self._kept(saver, trainer))

    def _kept(self, saver: Checkpoints, trainer: LoraTrainer) -> str:
        """Saves the state as it is after the last good step, and says where it is and how to go on."""
        step = trainer.state.global_step
        with self.signals.waiting():
            saver.save()
        return _newest(saver) if step else "Nothing was saved: there was no step"

    def _finish(self, trainer: LoraTrainer, saver: Checkpoints, rows: RunRows) -> Result:
        model, identity = trainer.model, saver.identity
        model.eval()
        saved, lines = _chosen(self.recipe, model, self.where, self.looks)
        finish.check_moved(model, identity.before)
        with self.signals.waiting():
            folder, why = finish.save_adapter(model, self.where)
        self.signals.check()
        metrics = self.looks.numbers(model, saved)
        record = {
            "run": identity.run, **finish.facts(model, rows), "stopped": None, "length": vars(trainer.length),
            "skipped_steps": trainer.guard.skipped, "micro_batch": trainer.micro.size, "dtype": identity.dtype,
            "metrics": metrics, **self.looks.steps(saved),
        }  # fmt: skip
        with told_apart(f"after the last step: the adapter is whole in {str(folder)!r}, and was not checked"):
            outcome = finish.conclude(self.recipe, self.where, folder, record, trainer, rows)
        if why is not None:
            raise LoraError(f"{why}. The adapter is in {str(folder)!r} instead")
        if outcome is not None:
            lines += map(str, outcome.lines)
            if outcome.failed:
                self.looks.watch.say("\n".join(lines))  # there will be no result to tell them
            outcome.judge(folder)
        if worse := self.looks.worse_than_base(saved):
            self.say(worse)
        return Result(folder, metrics, lines)


def _fitted(recipe: Recipe, rows: RunRows, found: resume.Found | None, notes: list[str]) -> Recipe:
    """The recipe with the batch that fits into memory, where that is asked for; a resume has found it before."""
    if not recipe.fit:
        return recipe
    if found is not None:
        return recipe.model_copy(update={name: found.state["recipe"][name] for name in ("batch_size", "grad_accum")})
    longest = max(len(row["input_ids"]) for row in rows.encoded.rows)
    fitted = largest_batch(recipe, longest=None if recipe.packing else longest)
    notes.append(str(fitted))
    return fitted.recipe(recipe)


def _chosen(recipe: Recipe, model: Any, where: place.Place, looks: Looks) -> tuple[int, list[str]]:
    """(the step whose adapter is saved, what to say of it). Where a run looks for the step to stop at, it is the best
    one, whose values the model is given; else the last."""
    folder, last = where.step(looks.best_step), looks.watch.steps
    if recipe.early_stop is None or looks.best_step in (0, last) or not folder.is_dir():
        return last, []
    resume.restore_adapter(folder, model)
    return looks.best_step, [f"the adapter is that of step {looks.best_step}, the best on the held-out rows"]


def _finished(where: place.Place, wanted: str) -> Result | None:
    """The result of the run that `--resume auto` means, where it is finished.

    Raises:
        CheckError: it did not pass its check, which a script that waits for success must hear each time.
    """
    record = where.finished() if wanted == "auto" else None
    if record is None or "run" not in record or where.newest_run() not in (None, record["run"]):
        return None
    text = f"resume: the run in {str(where.out)!r} is finished; --force starts anew"
    Outcome.recorded(record.get("outcome")).judge(where.out, f"{text}. ")
    return Result(where.out, record["metrics"], [text])


def _newest(saver: Checkpoints) -> str:
    """Where a run's newest checkpoint is, and how to go on from it."""
    if saver.newest is None:
        return "Nothing was saved"
    step = int(saver.newest.name.rpartition("-")[2])
    kept = saver.place.recipe  # not the step's own, which goes when newer ones come
    command = resume_command(kept if kept.is_file() else saver.newest / RECIPE_FILE)
    return f"All of it as it was after step {step} is in {str(saver.newest)!r}; to go on: {command}"


def _no_room(error: BaseException, step: int, saver: Checkpoints) -> OutOfMemoryError:
    """Memory ran out where no smaller batch helps; the optimizer's step may be half done, so nothing is saved now."""
    why = str(error).partition("\n")[0]
    return OutOfMemoryError(
        f"step {step}: memory ran out between two steps, in the optimizer or an evaluation ({why}). {SMALLER}. "
        f"{ADVICE}. {_newest(saver)}"
    )


def _each(texts: list[str], say: Say) -> None:
    for text in texts:
        say(text)


def _warn(text: str) -> None:
    warnings.warn(text, LoraWarning, stacklevel=2)
