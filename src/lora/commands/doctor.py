"""`lora doctor`: what works on this machine, and what to do where something does not."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ..errors import LoraError

_SIGNS = {True: "ok ", False: "not", None: "   "}


def doctor(
    model: Annotated[str | None, typer.Option("--model", help="Also look whether this base is here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, the GPU, and which fast paths work here, each by a tiny run; nothing is fetched.

    lora doctor --model org/base
    """
    from ..train.health import examine
    from ..train.quiet import quiet

    found = []
    with quiet():
        for each in examine(model):
            found.append(each)
            if not as_json:
                typer.echo(f"{_SIGNS[each.ok]}  {each.name + ':':17} {each.said}")
    broken = [each.name for each in found if each.needed and each.ok is False]
    if as_json:
        typer.echo(json.dumps({"usable": not broken, "findings": [asdict(each) for each in found]}, indent=2))
    if broken:
        raise LoraError(f"doctor: without these nothing trains here: {', '.join(broken)}; see their lines above")
