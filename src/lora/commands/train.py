"""`lora train`: its flags are the recipe's fields."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from ..train.recipe import Recipe, load_recipe
from .flags import flag, parsed


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
    plan = load_recipe(recipe, {name: parsed(name, value) for name, value in flags.items() if value is not None})

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


# typer reads the signature; this one says the recipe's fields once, where they are defined.
_recipe, _force, _ = inspect.signature(train).parameters.values()
train.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_recipe, *map(flag, Recipe.model_fields), _force]
)
