"""What a run does where the recipe says nothing: each default once, with its reason. docs/training.md tells whence.

Some follow from the base's size or the length of the run, so a recipe is resolved when these are known.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ..config import LoraConfig
from ..errors import LoraError
from . import known_targets
from .base_facts import BaseFacts

if TYPE_CHECKING:
    from .recipe import Recipe

R, TARGETS = 16, "all-linear"
PROMPTS = 10
BATCH_SIZE = 8
LR = 2e-4  # where neither the base's size nor the length of the run is known
_ALPHA, _ALPHA_RSLORA = 32.0, 8.0
LONGEST = 2048  # of a model that could take more
_WARMUP = 0.03
_SAVES = 20
# Full fine-tuning's rate at this size; it falls with the fourth root of the size. LoRA's is a multiple of it.
_FULL_RATE, _FULL_SIZE, _FULL_MOST = 2e-5, 8e9, 2e-4
_TIMES, _TIMES_SHORT, _SHORT = 10, 15, 100
_MANY_ROWS = 128  # a step
_A_SLIP = 0.75  # how like two names are that one takes for the other

_FIXED_OF_LORA = {
    "r": "enough for most data sets; more where the trained tokens outnumber the adapter's parameters",
    "targets": "every linear but the output head: with the MLPs, LoRA keeps up with full fine-tuning",
}
_FIXED_OF_PROMPTS = {"prompt_length": "as published, in the top 30 layers or in all where there are fewer"}
_FIXED = {"batch_size": "adapters suffer more from large batches than full fine-tuning, and no rank mends it"}
# Of prompts, which start at random behind closed gates: so many times LoRA's rate.
_PROMPT_TIMES = 20


def alpha(rslora: bool) -> float:
    """One alpha for all ranks: alpha / r then keeps the best learning rate where it is when the rank changes."""
    return _ALPHA_RSLORA if rslora else _ALPHA


@dataclass(frozen=True)
class Choice:
    """A default that a run takes, and why."""

    field: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = f"{self.value:g}" if isinstance(self.value, float) else str(self.value)
        return f"{self.field} {value}: {self.reason}"


@dataclass(frozen=True)
class Resolved:
    """A recipe without open ends, as far as they are known, and the defaults that it took."""

    recipe: "Recipe"
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        return "\n".join(f"default {choice}" for choice in self.choices)


def resolved(recipe: "Recipe", facts: BaseFacts | None, rows: int | None = None) -> Resolved:
    """The recipe with the defaults that these facts decide. What is set stays; asked twice, it adds what is new.

    Args:
        facts: the base's, or None where it cannot be reached.
        rows: in one pass of training: without the held-out ones, and packed ones counted once; None leaves open what
            depends on the length of the run.

    Raises:
        LoraError: the recipe asks for more than the model or the run has: max_length, warmup_steps.
    """
    steps = None if rows is None else total_steps(recipe, rows)
    steps = recipe.max_steps if steps is None else steps
    _check(recipe, facts, steps)
    a_pass = None if rows is None else _steps_of_a_pass(recipe, rows)
    choices = []
    for choice in _choices(recipe, facts, steps, a_pass):
        if choice.field not in recipe.model_fields_set or getattr(recipe, choice.field) is None:
            choices.append(choice)
    update = {choice.field: choice.value for choice in choices}
    share = recipe.warmup_steps
    if share is not None and share < 1 and steps is not None:
        update["warmup_steps"] = math.floor(share * steps)
    if recipe.eval_data is None and recipe.eval_share is None:
        update["samples"] = 0  # of what is not there; a recipe that was written is then told from one that asks
    return Resolved(recipe.model_copy(update=update), tuple(choices))


def total_steps(recipe: "Recipe", rows: int) -> int:
    """Optimizer steps of the run."""
    return recipe.max_steps or math.ceil((recipe.epochs or 1) * _steps_of_a_pass(recipe, rows))


def held_out(recipe: "Recipe", rows: int) -> int:
    """How many of the rows `eval_share` holds out: at least one, and never all."""
    if recipe.eval_share is None:
        return 0
    if rows < 2:
        raise LoraError(f"eval_share: there is {rows} row; hold out one of several, or give eval_data")
    return min(rows - 1, max(1, round(rows * recipe.eval_share)))


def doubts(recipe: "Recipe", trained_tokens: int, parameters: int) -> list[str]:
    """What speaks against a run that is about to start: a sentence for each.

    Args:
        trained_tokens: on which the loss falls, in one pass.
        parameters: that train.
    """
    told = []
    if trained_tokens > parameters:
        more = "a larger r, or more targets, has more" if recipe.method == "lora" else "method lora has more"
        told.append(
            f"one pass has {trained_tokens:,} trained tokens, and the adapter {parameters:,} parameters: it may be too "
            f"small to hold what they say; {more}"
        )
    if (rows := recipe.batch_size * recipe.grad_accum) > _MANY_ROWS:
        told.append(
            f"a step takes {rows:,} rows (batch_size {recipe.batch_size} x grad_accum {recipe.grad_accum}): adapters "
            "learn less from large batches than full fine-tuning does, and a larger r does not mend it"
        )
    return told


def rate(parameters: int | None, steps: int) -> tuple[float, str]:
    """The learning rate for a base of this size, and why."""
    short = steps <= _SHORT
    times, word = (_TIMES_SHORT, "fifteen") if short else (_TIMES, "ten")
    full = min(_FULL_MOST, _FULL_RATE * (_FULL_SIZE / (parameters or _FULL_SIZE)) ** 0.25)
    size = "a base of unknown size, taken for 8 B" if parameters is None else f"{amount(parameters)} parameters"
    why = f", as {steps} {_steps(steps)} make a short run" if short else ""
    return _round(times * full), f"{word} times full fine-tuning's, some {full:.1g} for {size}{why}"


def amount(number: int) -> str:
    """A large number in words: 8.0 B."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _steps(count: int) -> str:
    return "step" if count == 1 else "steps"


def _round(value: float) -> float:
    return float(f"{value:.1e}")


def _steps_of_a_pass(recipe: "Recipe", rows: int) -> int:
    return math.ceil(math.ceil(rows / recipe.batch_size) / recipe.grad_accum)


def _check(recipe: "Recipe", facts: BaseFacts | None, steps: int | None) -> None:
    most = None if facts is None else _most_tokens(recipe, facts)
    if most is not None and recipe.max_length is not None and recipe.max_length > most:
        raise LoraError(f"max_length is {recipe.max_length}, but the model takes {most} tokens; give at most {most}")
    if facts is not None:
        _check_targets(recipe, facts)
        _check_count(recipe, facts)
    if steps is not None and recipe.warmup_steps is not None and recipe.warmup_steps >= max(steps, 1):
        raise LoraError(
            f"warmup_steps is {recipe.warmup_steps:g}, but the run has only {steps} {_steps(steps)}; lower it, "
            "or train longer"
        )


def _most_tokens(recipe: "Recipe", facts: BaseFacts) -> int | None:
    """The longest row that this run may have: a classifier's is what its tokenizer takes too (`longest_text`)."""
    known = [facts.positions, facts.texts if recipe.task == "classify" else None]
    return min((most for most in known if most is not None and most < 1 << 20), default=None)


def _check_targets(recipe: "Recipe", facts: BaseFacts) -> None:
    """Refuses what fits nothing where all linears are known; the rest is told once the base is there."""
    for name in recipe.targets if facts.whole and isinstance(recipe.targets, list) else ():
        last = name.rpartition(".")[2]
        close = [] if last in facts.linears else get_close_matches(last, facts.linears, cutoff=_A_SLIP)
        if close:
            raise LoraError(f"targets: {name!r} fits no module of a {facts.kind} model; near names: {', '.join(close)}")
    if isinstance(config := recipe.adapter(), LoraConfig):
        known_targets.check(config, facts)


def _check_count(recipe: "Recipe", facts: BaseFacts) -> None:
    """Refuses prompts in more layers than there are."""
    wanted = recipe.layers[0] if isinstance(recipe.layers, list) else recipe.layers
    if recipe.method != "lora" and facts.layers is not None and wanted is not None and wanted > facts.layers:
        raise LoraError(f"layers is {wanted}, but the base has {facts.layers}; give at most so many, or leave it out")


def _choices(recipe: "Recipe", facts: BaseFacts | None, steps: int | None, a_pass: int | None) -> Iterator[Choice]:
    prompts = recipe.method != "lora"
    for field, reason in {**(_FIXED_OF_PROMPTS if prompts else _FIXED_OF_LORA), **_FIXED}.items():
        yield Choice(field, getattr(recipe, field), reason)
    scale = "alpha / sqrt(r)" if recipe.rslora else "alpha / r"
    if not prompts:
        yield Choice(
            "alpha", alpha(recipe.rslora), f"one for all ranks, so that the best rate hardly moves with r ({scale})"
        )
    if recipe.max_steps is None:
        yield Choice("epochs", 1.0, "one pass; more where the held-out loss still falls")
    if facts is not None and (takes := _most_tokens(recipe, facts)) is not None:
        whose = "the model" if takes == facts.positions else "the model's tokenizer"
        why = f"all that {whose} takes" if takes < LONGEST else "longer rows need more memory"
        yield Choice("max_length", min(takes, LONGEST), why)
    if steps is None:
        return
    if prompts:
        value, why = rate(None if facts is None else facts.parameters, steps)
        yield Choice("lr", _round(_PROMPT_TIMES * value), f"{_PROMPT_TIMES} times LoRA's, which is {why}")
    else:
        yield Choice("lr", *rate(None if facts is None else facts.parameters, steps))
    warmup = math.floor(_WARMUP * steps)
    why = f"{_WARMUP:.0%} of {steps} {_steps(steps)}" + (
        "" if warmup else ", rounded down: the first step of a warm-up is lost"
    )
    yield Choice("warmup_steps", warmup, why)
    yield Choice(
        "save_every", math.ceil(steps / _SAVES), f"a crash costs a twentieth of {steps} {_steps(steps)} at most"
    )
    if a_pass is not None and (recipe.eval_data is not None or recipe.eval_share is not None):
        yield Choice("eval_every", min(a_pass, steps), "after each pass" if a_pass <= steps else "at the end")
