"""What is typed for a recipe: `--set FIELD=VALUE`, and flags in other tools' words."""

from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

from ..errors import LoraError
from ..train.names import KNOWN, is_switch
from ..train.recipe import Recipe
from ..train.recipe_file import read_yaml, scalar
from .flags import parsed

_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


def settings_of(flags: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """The recipe's fields that were typed as flags, and those of `--set`. Raises `LoraError` for two values of one."""
    fields = {name: parsed(name, value) for name, value in flags.items() if value is not None}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise LoraError(f"--set: got {text[:80]!r}; write --set FIELD=VALUE, such as --set lr=1e-4")
        meant = _value(name, value.strip())
        if name in fields and fields[name] != meant and str(fields[name]) != str(meant):
            raise LoraError(f"{name}: given twice, as {fields[name]!r:.80} and {meant!r:.80}; give one")
        fields[name] = meant
    return fields


def _value(name: str, text: str) -> Any:
    if text.startswith(("[", "{")):
        try:
            return read_yaml(text)
        except LoraError as error:
            raise LoraError(f"--set {name}: {text[:80]!r} is no list or mapping of YAML: {error}") from error
    if scalar(text) is None:
        return None
    return parsed(name, text) if name in Recipe.model_fields else scalar(text)


class RecipeCommand(TyperCommand):
    """A command whose flags may be written as other tools write them: `--learning_rate 1e-4`, `--bf16 True`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # The other way to write a flag: `--no-packing` of `--packing`.
        flags = {flag: (param.secondary_opts or [""])[0] for param in self.params for flag in param.opts}
        others = {flag: flag for param in self.params for flag in param.secondary_opts}
        return super().parse_args(ctx, in_our_words(args, {**others, **flags}))


def in_our_words(args: Sequence[str], flags: Mapping[str, str]) -> list[str]:
    """The command line with each flag that is another tool's as `--set NAME=VALUE`, and ours with hyphens.

    Args:
        flags: our flags, each with the one that says no, or nothing where it takes a value.
    """
    words: list[str] = []
    left = list(args)
    while left:
        word = left.pop(0)
        if word == "--":
            return [*words, word, *left]
        text, equals, value = word.partition("=")
        name = text[2:].replace("-", "_")
        ours = f"--{name.replace('_', '-')}"
        truth = left[0].lower() if left and not equals else value.lower()
        if not word.startswith("--") or (ours not in flags and name not in KNOWN):
            words.append(word)
        elif ours not in flags:
            if not equals:
                alone = is_switch(name) and truth not in (*_TRUE, *_FALSE)
                if not alone and not left:
                    raise LoraError(f"{text}: it needs a value")
                value = "true" if alone else left.pop(0)
            words += ["--set", f"{name}={value}"]
        elif flags[ours] and truth in (*_TRUE, *_FALSE):  # `--packing True`
            words.append(ours if truth in _TRUE else flags[ours])
            left = left if equals else left[1:]
        else:
            words.append(f"{ours}{equals}{value}")
    return words
