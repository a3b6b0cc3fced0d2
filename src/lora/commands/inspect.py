"""`lora inspect`: what an adapter folder holds, without its base model and without torch."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LoraError

if TYPE_CHECKING:
    from ..files.norms import Norm

MANY = 8  # names in one line


def inspect(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, ours or PEFT's.")],
    with_norms: Annotated[
        bool, typer.Option("--norms", help="Show the size of each update, the Frobenius norm of s B A, by layer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show an adapter's targets, shapes, size, scaling and base model, and check its file.

    lora inspect my-adapter
    """
    from ..files.description import describe
    from ..files.norms import norms

    found = describe(adapter)
    sizes = norms(found.file) if with_norms else []
    if as_json:
        content = found.as_dict()
        if with_norms:
            content["norms"] = [
                {"module": each.module, "rank": each.rank, "norm": each.norm if math.isfinite(each.norm) else None}
                for each in sizes
            ]
        typer.echo(json.dumps(content, indent=2))
    else:
        typer.echo(str(found))
        if with_norms:
            typer.echo("\n" + _shown(sizes))
    if found.damaged:
        raise LoraError(f"adapter: {str(adapter)!r} is damaged; see above")


def _shown(sizes: list["Norm"]) -> str:
    """A line for each layer, a column for each target, and which updates stand out."""
    from ..tables import table

    layers: dict[str, dict[str, float]] = {}
    for each in sizes:
        layer, target = _place(each.module)
        layers.setdefault(layer, {})[target] = each.norm
    targets = list(dict.fromkeys(_place(each.module)[1] for each in sizes))
    rows = [[layer, *(_number(found.get(target)) for target in targets)] for layer, found in layers.items()]
    lines = ["norms of s B A, by layer", table(["layer", *targets], rows)]
    finite = [each for each in sizes if math.isfinite(each.norm)]
    if finite:
        largest = max(finite, key=lambda each: each.norm)
        lines.append(f"largest: {largest.module}, {_number(largest.norm)}")
    zero, broken = [e.module for e in finite if e.norm == 0], [e.module for e in sizes if not math.isfinite(e.norm)]
    if zero:
        lines.append(f"zero, so that they change nothing: {_few(zero)}")
    if broken:
        lines.append(f"NOT FINITE: {_few(broken)}")
    return "\n".join(lines)


def _place(module: str) -> tuple[str, str]:
    """(the number of the layer, or "-"; what the target is called within it)"""
    words = module.split(".")
    at = next((i for i, word in enumerate(words) if word.isdecimal()), None)
    return ("-" if at is None else words[at]), words[-1] if at is not None else module


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(names[:MANY]) + more
