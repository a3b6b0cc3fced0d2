"""The commands, as one typer app. Modules here import torch and transformers inside their functions only."""

from typing import Annotated

import typer

from .. import __version__
from .chat import chat
from .check import check
from .data import app as data
from .doctor import doctor
from .estimate import estimate
from .eval import evaluate
from .generate import generate
from .inspect import inspect
from .merge import merge
from .recipes import recipes
from .settings import RecipeCommand
from .sweep import sweep
from .train import train

# Plain help pages: rich's panels cost 0.12 s of the half second that `--help` may take.
app = typer.Typer(name="lora", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora {__version__}")
        raise typer.Exit


@app.callback()
def lora(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (or set LORA_DEBUG=1).")
    ] = False,
) -> None:
    """Adapt a language model with low-rank updates, try it, and merge it."""


app.command(cls=RecipeCommand)(train)
app.command()(recipes)
app.command()(generate)
app.command()(chat)
app.command("eval")(evaluate)
app.command()(check)
app.command()(merge)
app.command()(inspect)
app.command()(estimate)
app.add_typer(data, name="data")
app.command()(doctor)
app.command()(sweep)
