"""`lora recipes`: the recipes that ship with the library, or those of a file."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LoraError, near
from ..tables import table
from ..train.recipe_file import to_yaml
from ..train.sources import entries, shipped

_SHOWN = ("base_model", "lora_r", "quant_bits", "learning_rate", "num_epochs", "model", "r", "lr", "epochs")


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.", show_default=False)] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--recipes", help="A file of recipes by name, such as FinLoRA's finetune_configs.json.", show_default=False
        ),
    ] = None,
) -> None:
    """List the recipes that `lora train NAME` runs, or print one.

    lora recipes qlora
    """
    if file is not None:
        known = entries(file)
        if name is None:
            fields = [field for field in _SHOWN if any(field in entry for entry in known.values())]
            rows = [[each, *(str(entry.get(field, "")) for field in fields)] for each, entry in known.items()]
            typer.echo(table(["recipe", *fields], rows))
            return
        _check(name, list(known))
        typer.echo(to_yaml(known[name]), nl=False)
        return
    own = shipped()
    if name is None:
        first = {each: path.read_text(encoding="utf-8").splitlines()[0] for each, path in own.items()}
        typer.echo(table(["recipe", "what it is"], [[each, line.lstrip("# ")] for each, line in first.items()]))
        return
    _check(name, list(own))
    typer.echo(own[name].read_text(encoding="utf-8"), nl=False)


def _check(name: str, known: list[str]) -> None:
    if name not in known:
        raise LoraError(f"recipe: there is none called {name[:80]!r}{near(name[:80], known)}")
