"""Going on from a checkpoint: which one, whether it is of this run, and its state back where it came from."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraError
from ..files.adapter import reading
from ..files.commit import replaced
from ..files.fingerprint import difference
from ..layers import hosts
from ..saving import BASE, keys_of
from .checkpoints import PARTS, RANDOM_FILE, SCHEDULER_FILE, STATE_FILE, Identity, load_optimizer
from .generators import Generators
from .manifest import MANIFEST, faults, manifest_of
from .metrics import METRICS_FILE
from .place import Place
from .recipe import Recipe
from .steps import RunCallback
from .trainer import LoraTrainer
from .trees import read_tree

ADAPTER = "default"  # what inject calls it
SPARE = ("optimizer", "scheduler", "random", "metrics")  # parts that a resume may be told to go on without
# Fields that do not change what the remaining steps compute. Of model, data and eval_data the content is compared.
FREE = frozenset(
    {"model", "data", "eval_data", "out", "eval_every", "early_stop", "samples", "save_every", "max_bad_steps", "check",
     "track", "log_every", "gradient_checkpointing", "offload", "fit", "batch_size", "grad_accum"}
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from. without: parts that it lacks, or that are damaged, and may."""

    folder: Path
    step: int
    state: dict[str, Any]
    without: tuple[str, ...]

    @property
    def identity(self) -> Identity:
        return Identity(**self.state["identity"])


def find(place: Place, resume: str, without: Sequence[str], say: Callable[[str], None]) -> Found | None:
    """The checkpoint that `resume` means: "none", "auto" for the newest whole one, or a checkpoint's folder.

    What is passed over is said. Where there is none at all, "auto" is a run from the start.

    Raises:
        LoraError: there are some, and none is whole; or the one that was named is not.
    """
    if unknown := [part for part in without if part not in SPARE]:
        raise LoraError(f"resume_without is {unknown[0]!r}; allowed: {', '.join(SPARE)}")
    if resume == "none":
        return None
    if resume != "auto":
        wrong = _wrong(Path(resume))
        if set(wrong) - set(without):
            raise LoraError(f"resume: {_described(Path(resume), wrong)}")
        return _found(Path(resume), wrong)
    passed = {}
    for folder in place.steps():
        wrong = _wrong(folder)
        if not set(wrong) - set(without):
            return _found(folder, wrong)
        passed[folder] = wrong
        say(f"resume: passed over {_described(folder, wrong)}")
    if passed:
        every = "\n  - ".join(_described(folder, wrong) for folder, wrong in passed.items())
        raise LoraError(f"resume: no checkpoint in {str(place.checkpoints)!r} is whole:\n  - {every}")
    say(f"resume: there is no checkpoint in {str(place.checkpoints)!r}; the run starts from its beginning")
    return None


def check_replaces(found: Found | None, place: Place, force: bool) -> None:
    """Raises `LoraError` where a run would take the place of another: a resume goes on with the run that is in `out`,
    or into a folder in which there is none."""
    if force or (found is not None and found.folder.resolve().parent == place.checkpoints.resolve()):
        return
    if place.occupied or (found is not None and place.steps()):
        what = "an adapter" if place.occupied else "checkpoints of another run"
        raise LoraError(f"out: {str(place.out)!r} already holds {what}; give another folder, or --force to replace it")


def _wrong(folder: Path) -> dict[str, str]:
    """What is wrong with each part of a checkpoint; "manifest" where nothing can be said of any."""
    manifest = manifest_of(folder)
    if not folder.is_dir() or manifest is None:
        there = (folder / MANIFEST).exists()
        lacks = f"it has no {MANIFEST}" if folder.is_dir() else "it is not there"
        return {"manifest": f"its {MANIFEST} is damaged" if there else lacks}
    bad = faults(folder, manifest)
    found = {}
    for part, files in PARTS.items():
        for name in files:
            if name not in manifest["files"]:
                found[part] = f"{name} is missing"
            elif name in bad:
                found[part] = f"{name} {bad[name]}"
    return found


def _described(folder: Path, wrong: dict[str, str]) -> str:
    text = f"{str(folder)!r}: {'; '.join(wrong.values())}"
    if wrong and not set(wrong) - set(SPARE):
        flags = " ".join(f"--resume-without {part}" for part in wrong)
        text += f"; {flags} goes on without"
    return text


def _found(folder: Path, wrong: dict[str, str]) -> Found:
    try:
        state = json.loads((folder / STATE_FILE).read_bytes())
        return Found(folder, int(state["step"]), state, tuple(wrong))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise LoraError(f"resume: {str(folder / STATE_FILE)!r} cannot be read ({error}); take another one") from error


def compare(found: Found, recipe: Recipe, data: str, eval_data: str | None, dtype: str) -> None:
    """Raises `LoraError` that names all in which this run would compute something else than the checkpoint's."""
    now = recipe.model_dump(mode="json")
    later = {name: Recipe.model_fields[name].default for name in ("method", "prompt_length")}  # than some checkpoints
    was = {**later, **found.state["recipe"]}
    other = [f"{name} was {was.get(name)!r} and is {now[name]!r}" for name in now if name not in FREE
             and was.get(name) != now[name]]  # fmt: skip
    rows = [fields["batch_size"] * fields["grad_accum"] for fields in (was, now)]
    if rows[0] != rows[1]:
        other.append(f"batch_size times grad_accum was {rows[0]} and is {rows[1]}")
    identity = found.identity
    if not other and identity.data != data:
        other.append(f"data: the rows of {recipe.data!r} are not the ones that it was trained on")
    if not other and identity.eval_data != eval_data:
        other.append("eval_data: the held-out rows are others")
    if identity.dtype != dtype and was.get("dtype") == now["dtype"]:
        other.append(f"dtype: {now['dtype']} meant {identity.dtype} and means {dtype} here; name it")
    if other:
        lines = "\n  - ".join(other)
        raise LoraError(
            f"resume: {str(found.folder)!r} is of another run:\n  - {lines}\nTake the recipe beside it, or start anew "
            "with --force"
        )


def restore_adapter(folder: Path, model: Any) -> None:
    """Give what trains the checkpoint's values, in place. Raises `LoraError` for another base or other parameters."""
    tensors: dict[str, Tensor] = {}
    weights = {}
    for name, host, adapters in hosts(model):
        if ADAPTER in adapters:
            tensors |= keys_of(type(adapters), adapters[ADAPTER], name)
        if (weight := adapters.weight(host)) is not None:
            weights[name] = weight
    file = reading(folder, lambda file: file)
    if BASE in file.metadata and (why := difference(file.metadata[BASE], weights)) is not None:
        raise LoraError(f"resume: {str(folder)!r} was trained on another base: {why}")
    values = file.tensors()
    if values.keys() != tensors.keys():
        odd = sorted(values.keys() ^ tensors.keys())
        raise LoraError(f"resume: {str(folder)!r} is of other parameters: {odd[0]} and {len(odd) - 1} more")
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(values[key])


def is_over(found: Found) -> bool:
    """Whether the training had ended, and only what comes after it is left to do."""
    return bool(found.state["over"])


def restore_metrics(found: Found, place: Place) -> None:
    """The curve up to the checkpoint; what the run wrote later is taken back."""
    if "metrics" not in found.without:
        with replaced(place.live / METRICS_FILE) as file:
            shutil.copyfile(found.folder / METRICS_FILE, file)


def restore_run(found: Found, trainer: LoraTrainer, kept: Sequence[RunCallback]) -> None:
    """All but the adapter: the counts, the optimizer, the schedule, the random numbers."""
    restore_counts(found, trainer, kept)
    assert trainer.lr_scheduler is not None
    if "optimizer" not in found.without:
        load_optimizer(trainer, read_tree(found.folder, "optimizer"))
    if "scheduler" not in found.without:
        trainer.lr_scheduler.load_state_dict(json.loads((found.folder / SCHEDULER_FILE).read_bytes()))
    else:  # it follows from the step
        trainer.lr_scheduler.last_epoch = found.step - 1
        trainer.lr_scheduler.step()
    for group, lr in zip(trainer.lr_scheduler.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr  # of a fresh optimizer it is the first step's
    if "random" not in found.without:
        trainer.random = Generators.of(json.loads((found.folder / RANDOM_FILE).read_bytes()))


def restore_counts(found: Found, trainer: LoraTrainer, kept: Sequence[RunCallback]) -> None:
    """What tells of a run: the step, the place in the rows, the micro-batches, and what its callbacks have counted."""
    state = found.state
    trainer.state.global_step = found.step
    trainer.feed.position = trainer.position = state["position"]
    trainer.guard.skipped = state["skipped"]
    trainer.micro.size = min(trainer.micro.size, state["micro"]["size"])
    trainer.micro.parts = max(trainer.micro.parts, state["micro"]["parts"])
    for each in kept:
        each.restore(state["callbacks"].get(type(each).__name__, {}))
