"""`lora train`: its flags are the recipe's fields."""

import inspect
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from ..config import SETTINGS
from ..errors import LoraError
from ..train.recipe import Recipe, load_recipe

_SIMPLE_NAMES = re.compile(r"[\w.-]+(,[\w.-]+)*")
_PAIR = re.compile(r"([^=]+)=([^=,]+)(?:,|$)")


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A YAML or JSON file with the fields below.", show_default=False)
    ] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is already in --out.")] = False,
    **flags: Any,
) -> None:
    """Train an adapter on your rows: from a recipe file, from flags, or both (flags win).

    The loss falls on the answers only. Rows may be prompt/completion, messages, sharegpt conversations, alpaca,
    context/target, question/answer or plain text.

        lora train --model org/base --data rows.jsonl --out my-adapter
    """
    plan = load_recipe(recipe, {name: _parsed(name, value) for name, value in flags.items() if value is not None})

    from ..train.quiet import quiet
    from .console import clean_warnings, stderr

    with quiet():  # Trainer imports bitsandbytes where it is there, which remarks on the kernels that it found
        from ..train.job import run

    with clean_warnings():
        result = run(plan, force=force, console=stderr())
    numbers = result.metrics
    typer.echo(
        f"loss {numbers['loss']:.4f}"
        + (f", eval loss {numbers['eval_loss']:.4f}" if "eval_loss" in numbers else "")
        + f" after {numbers['steps']:,} steps, {numbers['seconds']:.0f} s, {numbers['tokens_per_second']:,.0f} tokens/s"
    )
    typer.echo(f"adapter: {result.out}")


def _parsed(name: str, value: Any) -> Any:
    """A flag's text as its field's value: lists take commas, and patterns `--rank-pattern down_proj=16,o_proj=4`.

    Where a field may also be a regular expression, what is no list of simple names is one.
    """
    kinds = _kinds(Recipe.model_fields[name].annotation)
    if dict in kinds:
        if not value or _PAIR.sub("", value):
            raise LoraError(f"{name}: got {value!r}; write --{name.replace('_', '-')} NAME=NUMBER,NAME=NUMBER")
        return dict(_PAIR.findall(value))
    if list not in kinds or (str in kinds and (value == "all-linear" or not _SIMPLE_NAMES.fullmatch(value))):
        return value
    return [part for part in value.split(",") if part]


def _flag(name: str) -> inspect.Parameter:
    """The flag of a recipe field: its type, its description as help, and None (not given) as default."""
    field = Recipe.model_fields[name]
    flag = "--" + name.replace("_", "-")
    kinds = _kinds(field.annotation)
    help_text = field.description or ""
    choices = SETTINGS[name].choices if name in SETTINGS else ()
    if get_origin(field.annotation) is Literal:
        choices = get_args(field.annotation)
    if choices:
        help_text = f"{help_text.removesuffix('.')}: {', '.join(choices)}."
    is_bool = field.annotation is bool
    if not is_bool and not field.is_required() and field.default not in (None, {}, []):
        help_text += f" [default: {field.default}]"
    option = typer.Option(f"{flag}/--no-{flag[2:]}" if is_bool else flag, help=help_text, show_default=False)
    # Choices, lists and patterns stay text, for the recipe to judge.
    kind = next((kind for kind in (bool, int, float) if kind in kinds and not kinds & {list, dict}), str)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kinds(annotation: Any) -> set[Any]:
    """The alternatives of a type, without what lists and dicts hold."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return {get_origin(option) or option for option in options}


# typer reads the signature; this one says the recipe's fields once, where they are defined.
_recipe, _force, _ = inspect.signature(train).parameters.values()
train.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_recipe, *map(_flag, Recipe.model_fields), _force]
)
