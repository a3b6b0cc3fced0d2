"""Fields of the recipe as flags of a command, and the text of such a flag as the field's value."""

import inspect
import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from ..config import SETTINGS
from ..errors import LoraError
from ..train.recipe import Recipe

_SIMPLE_NAMES = re.compile(r"[\w.-]+(,[\w.-]+)*")
_PAIR = re.compile(r"([^=]+)=([^=,]+)(?:,|$)")


def parsed(name: str, value: Any) -> Any:
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


def flag(name: str) -> inspect.Parameter:
    """The flag of a recipe field: its type, its description as help, and None (not given) as default."""
    field = Recipe.model_fields[name]
    written = "--" + name.replace("_", "-")
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
    option = typer.Option(f"{written}/--no-{written[2:]}" if is_bool else written, help=help_text, show_default=False)
    # Choices, lists and patterns stay text, for the recipe to judge.
    kind = next((kind for kind in (bool, int, float) if kind in kinds and not kinds & {list, dict}), str)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kinds(annotation: Any) -> set[Any]:
    """The alternatives of a type, without what lists and dicts hold."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return {get_origin(option) or option for option in options}
