"""The order of a run: place, needs, rows, model, training, and what is written at the end."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import lora

from ..bases import weight_of
from ..data.encode import EncodedData, encode_rows
from ..data.rows import read_rows
from ..data.template import PromptTemplate
from ..errors import LoraError, NonFiniteError
from ..files.commit import replaced
from ..files.fingerprint import quantization
from ..layers.host import base_modules
from .base import check_quantization, load_base, load_tokenizer, pick_dtype
from .base_facts import read_facts
from .checks import check_out
from .defaults import LONGEST, resolved
from .needs import check_liger, check_needs
from .recipe import RECIPE_FILE, RUN_FILE, Recipe
from .trainer import train
from .watch import Watch


@dataclass(frozen=True)
class Result:
    """Where the adapter lies, and the run's numbers.

    metrics: `loss` (mean of the last `log_every` steps), `seconds`, `tokens`, `tokens_per_second`, `steps`,
    `trainable_parameters`, and `eval_loss` when there was eval_data.
    """

    out: Path
    metrics: dict[str, float]


def run(recipe: Recipe, *, force: bool = False, console: Console | None = None) -> Result:
    """Trains an adapter as the recipe says and saves it, with the recipe and the run's numbers beside it.

    Nothing but the adapter is written, and it is written once, at the end. When the loss stops being a finite
    number, or on Ctrl-C, the adapter of the last good step is saved.

    Args:
        recipe: what to do.
        force: replace an adapter that is already in `recipe.out`.
        console: where to show progress; None shows nothing.

    Raises:
        LoraError: anything wrong with the model, the data or the settings, before the first step.
        NonFiniteError: the loss or its gradient became NaN or infinite; the message says at which step.
    """
    facts = read_facts(recipe.model)
    recipe = resolved(recipe, facts).recipe
    out = check_out(recipe, force, facts)
    check_needs(recipe)
    check_quantization(recipe.model, recipe.quantize)
    console = console or Console(quiet=True)
    transformers.set_seed(recipe.seed)
    template = PromptTemplate(load_tokenizer(recipe.model))
    length = recipe.max_length or LONGEST
    data = encode_rows(read_rows(recipe.data), template, length)
    console.print(f"data: {data}", highlight=False)
    held_out = None
    if recipe.eval_data is not None:
        held_out = encode_rows(read_rows(recipe.eval_data, "eval_data"), template, length, "eval_data")
        console.print(f"eval_data: {held_out}", highlight=False)
    recipe = resolved(recipe, facts, len(data.rows)).recipe
    model = _adapted(recipe)
    watch = Watch(console, recipe.log_every)
    try:
        train(recipe, model, template, data, held_out, watch)
    except (NonFiniteError, KeyboardInterrupt) as error:
        kept = "Nothing was saved"
        if watch.steps > 0 and _finite(model):
            _save(recipe, model, out, data, watch, stopped=str(error) or "interrupted")
            kept = f"The adapter as it was after step {watch.steps} is in {str(out)!r}"
        if isinstance(error, NonFiniteError):
            advice = "Lower lr, lengthen the warm-up, or look for broken rows"
            raise NonFiniteError(f"{error}. {kept}. {advice}", error.step) from error
        console.print(kept, highlight=False)
        raise
    if not _finite(model):
        raise LoraError(f"the adapter holds NaN or infinity after step {watch.steps}, so it was not saved; lower lr")
    return Result(out, _save(recipe, model, out, data, watch))


def _adapted(recipe: Recipe) -> Any:
    model = load_base(recipe.model, pick_dtype(recipe.dtype), recipe.quantize)
    lora.inject(model, config=recipe.adapter())
    if recipe.liger:
        check_liger(model)
    if recipe.offload and not getattr(model, "is_quantized", False):
        model.to("cuda")  # where Trainer would take it; prepare wants to see the GPU
    return lora.prepare(model, checkpointing="offload" if recipe.offload else recipe.gradient_checkpointing)


def _finite(model: Any) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad)


def _save(
    recipe: Recipe, model: Any, out: Path, data: EncodedData, watch: Watch, stopped: str | None = None
) -> dict[str, float]:
    """Writes the adapter, then recipe.yaml and run.json beside it, each atomically; returns the metrics."""
    lora.save(model, out)
    metrics: dict[str, float] = {
        "loss": watch.recent_loss, "seconds": round(watch.seconds, 3), "tokens": watch.tokens,
        "tokens_per_second": round(watch.tokens_per_second, 1), "steps": watch.steps,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }  # fmt: skip
    if watch.eval_loss is not None:
        metrics["eval_loss"] = watch.eval_loss
    record = {
        "format": data.format, "rows": len(data.rows), "rows_too_long": data.dropped, "max_length": data.max_length,
        "quantisation": quantization({n: w for n, m in base_modules(model) if (w := weight_of(m)) is not None}),
        "stopped": stopped, "metrics": metrics,
        "versions": {"lora": lora.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    for name, content in ((RECIPE_FILE, recipe.to_yaml()), (RUN_FILE, json.dumps(record, indent=2) + "\n")):
        with replaced(out / name) as file:
            file.write_text(content, encoding="utf-8")
    return metrics
