"""`lora sweep`: its flags are the recipe's fields, and `--over` says which of them are tried."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Stopped
from ..tables import table
from ..train.recipe import Recipe, load_recipe
from .flags import flag, parsed

if TYPE_CHECKING:
    from ..train.sweep import Trial


def sweep(
    recipe: Annotated[
        Path | None, typer.Argument(help="A YAML or JSON file with the fields below.", show_default=False)
    ] = None,
    *,
    over: Annotated[
        list[str],
        typer.Option("--over", help="lr=1e-4..1e-3, r=8,16, alpha=..., targets=q_proj+v_proj,all-linear; repeat it."),
    ],
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, help="Runs in all [default: each combination, or 12 where one is a range]."),
    ] = None,
    **flags: Any,
) -> None:
    """Search for the values with the lowest loss on held-out rows; started again, it goes on where it was.

    lora sweep recipe.yaml --over lr=1e-4..1e-3 --over r=8,16 --trials 12 --out out/sweep
    """
    plan = load_recipe(recipe, {name: parsed(name, value) for name, value in flags.items() if value is not None})

    from ..train.quiet import quiet
    from .console import clean_warnings, stderr

    with quiet():
        from ..train.job import run
    from ..train import sweep as of_sweep
    from ..train.signals import Signals
    from ..train.sweep_picture import draw

    console, done = stderr(), 0

    def told(trial: "Trial", wanted: int) -> None:
        nonlocal done
        done += 1
        console.print(f"trial {trial.number + 1} of {wanted}: {_values(trial)}: {_loss(trial)}", highlight=False)

    out = Path(plan.out)
    try:
        with clean_warnings(), Signals().listening() as signals:  # a run listens for itself; these are between two
            found = of_sweep.sweep(
                plan, over, trials=trials, run=lambda one: run(one, force=True).metrics, told=told, signals=signals
            )
    except Stopped as stopped:
        _tell_stopped(stopped, out, done)
        raise typer.Exit(stopped.exit_code) from stopped
    _show(found)
    picture = draw(out, found, [of_sweep.Axis.of(text) for text in over])
    if picture is not None:
        typer.echo(f"best: {_values(found[0])}: {_loss(found[0])}; recipe: {out / of_sweep.BEST}; picture: {picture}")


def _tell_stopped(stopped: Stopped, out: Path, done: int) -> None:
    """What is kept of the sweep; what the message says was kept is the trial's, which is done again."""
    how = str(stopped).partition(". ")[0]
    typer.echo(
        f"error: {how}. The trials that ended are kept in {str(out)!r}, {done} of this call and those before it; "
        "the same command goes on, with the trial that was stopped from its start",
        err=True,
    )


def _show(found: list["Trial"]) -> None:
    names = list(found[0].values)
    rows = [
        [str(t.number + 1), *(_text(t.values.get(name)) for name in names), _loss(t), f"{t.seconds:.0f}"] for t in found
    ]
    typer.echo(table(["trial", *names, "held-out loss", "seconds"], rows))


def _values(trial: "Trial") -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in trial.values.items())


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _loss(trial: "Trial") -> str:
    return f"{trial.loss:.4f}" if trial.loss is not None else trial.why.partition(".")[0]


# typer reads the signature; this one says the recipe's fields once, where they are defined.
_recipe, _over, _trials, _ = inspect.signature(sweep).parameters.values()
sweep.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_recipe, *map(flag, Recipe.model_fields), _over, _trials]
)
