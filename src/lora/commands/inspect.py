"""`lora inspect`: what an adapter folder holds, without its base model and without torch."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LoraError


def inspect(adapter: Annotated[Path, typer.Argument(help="Adapter folder, ours or PEFT's.")]) -> None:
    """Show an adapter's targets, shapes, size, scaling and base model, and check its file.

    lora inspect my-adapter
    """
    from ..files.description import describe

    found = describe(adapter)
    typer.echo(str(found))
    if found.damaged:
        raise LoraError(f"adapter: {str(adapter)!r} is damaged; see above")
