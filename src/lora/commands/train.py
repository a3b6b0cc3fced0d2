"""`lora train`: its flags are the recipe's fields."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import Stopped
from ..train.recipe import Recipe, load_recipe
from .flags import flag
from .settings import settings_of

_Recipe = Annotated[
    str | None,
    typer.Argument(help="A YAML or JSON file with the fields below, or a recipe's name.", show_default=False),
]
_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field; may be repeated.", show_default=False)
]
_Recipes = Annotated[
    Path | None,
    typer.Option(help="A file of recipes by name, such as FinLoRA's finetune_configs.json.", show_default=False),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, every setting resolved, and stop.")]
_Resume = Annotated[
    str, typer.Option(help="Go on from a checkpoint: auto is the newest whole one in --out, or a folder; or none.")
]
_ResumeWithout = Annotated[
    list[str] | None,
    typer.Option(metavar="PART", help="Go on although this part of the checkpoint is missing.", show_default=False),
]
_Force = Annotated[bool, typer.Option("--force", help="Replace an adapter that is already in --out.")]


def train(
    recipe: _Recipe = None,
    *,
    setting: _Set = None,
    recipes: _Recipes = None,
    dry_run: _DryRun = False,
    resume: _Resume = "none",
    resume_without: _ResumeWithout = None,
    force: _Force = False,
    **flags: Any,
) -> None:
    """Train an adapter on your rows: from a recipe, from flags, or both (flags win).

    RECIPE is a file, or a name that `lora recipes` lists. Other tools' names for a setting are understood. The loss
    falls on the answers only; rows may be prompt/completion, messages, sharegpt conversations, alpaca,
    context/target, question/answer or plain text.

        lora train --model org/base --data rows.jsonl --out my-adapter
    """
    from ..train.checks import cheap
    from ..train.dry_run import dry_run as told
    from .console import clean_warnings, leaving_at_once, stderr

    with clean_warnings():
        plan = load_recipe(recipe, settings_of(flags, setting or []), recipes=recipes)
        if dry_run:
            text, error = told(plan, force)
            typer.echo(text)
            if error is not None:
                raise error
            return
        cheap(plan, force or resume != "none")
        with leaving_at_once():
            from ..train.quiet import quiet

            with quiet():  # Trainer imports bitsandbytes where it is there, which remarks on the kernels that it found
                from ..train.job import run
        try:
            _tell(run(plan, force=force, resume=resume, resume_without=resume_without or (), console=stderr()))
        except Stopped as stopped:  # typer knows Ctrl-C alone, and would not say what was kept
            typer.echo(f"error: {stopped}", err=True)
            raise typer.Exit(stopped.exit_code) from stopped


def _tell(result: Any) -> None:
    numbers = result.metrics
    typer.echo(
        f"loss {numbers['loss']:.4f}"
        + (f", eval loss {numbers['eval_loss']:.4f}" if "eval_loss" in numbers else "")
        + f" after {numbers['steps']:,} steps, {numbers['seconds']:.0f} s, {numbers['tokens_per_second']:,.0f} tokens/s"
    )
    for line in result.lines:
        typer.echo(line)
    typer.echo(f"adapter: {result.out}")


# typer reads the signature; this one says the recipe's fields once, where they are defined.
_recipe, *_others, _ = inspect.signature(train).parameters.values()
train.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_recipe, *map(flag, Recipe.model_fields), *_others]
)
