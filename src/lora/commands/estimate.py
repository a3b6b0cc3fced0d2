"""`lora estimate`: what a training step takes of memory, before anything is loaded."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import SETTINGS
from ..errors import LoraError
from ..train.recipe import Recipe, load_recipe
from .flags import flag, parsed

FIELDS = [
    "method", *SETTINGS, "prompt_length", "batch_size", "grad_accum", "max_length", "task", "dtype", "quantize",
    "gradient_checkpointing", "offload", "optimizer", "liger",
]  # fmt: skip
RECIPES = (".yaml", ".yml")
NEED_A_GPU = ("offload", "liger")
_NOTHING = {"data": "-", "out": "-"}  # needed in a recipe, without meaning here: nothing is read, trained or written


def estimate(
    source: Annotated[
        str, typer.Argument(help="A model's folder, config.json or name on the hub; or a recipe (.yaml).")
    ],
    *,
    device: Annotated[
        str, typer.Option("--device", help="auto, cuda or cpu; auto is the GPU, here or where a setting needs one.")
    ] = "auto",
    padded: Annotated[
        bool, typer.Option("--padded", help="Rows of different lengths, whose attention has a mask.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
    **flags: Any,
) -> None:
    """Estimate the peak memory of a training step, by part, from a config alone.

    lora estimate org/base --r 16 --targets all-linear --batch-size 4 --quantize nf4 --gradient-checkpointing
    """
    if device not in ("auto", "cuda", "cpu"):
        raise LoraError(f"device is {device!r}; allowed: auto, cuda, cpu")
    given = {name: parsed(name, value) for name, value in flags.items() if value is not None}
    if source.endswith(RECIPES):
        recipe = load_recipe(Path(source), {**_NOTHING, **given})
    else:
        recipe = load_recipe(None, {**_NOTHING, "model": source, **given})

    from ..train.estimate import estimate as run

    needs = any(getattr(recipe, name) for name in NEED_A_GPU) or recipe.optimizer == "paged_adamw"
    if device == "cpu" and needs:
        raise LoraError("device is 'cpu', but offload, liger and paged_adamw need a GPU; leave them out, or give cuda")
    found = run(recipe, device="cuda" if needs else None if device == "auto" else device, padded=padded)
    typer.echo(found.to_json() if as_json else str(found), nl=not as_json)


_source, _device, _padded, _json, _ = inspect.signature(estimate).parameters.values()
estimate.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_source, *(flag(name) for name in FIELDS if name in Recipe.model_fields), _device, _padded, _json]
)
