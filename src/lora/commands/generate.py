"""`lora generate`: answers from a model, with or without an adapter."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LoraError


def generate(
    model: Annotated[str, typer.Argument(help="Base or merged model: a folder, or a name on the hub.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder; without it the model answers alone.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt; the answer goes to stdout.")] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help="Rows to answer, in any format that `lora train` reads.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the rows go as .jsonl, each with a field `generated`.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Prompts answered at a time.")] = 16,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seeds the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type of the weights: auto, fp32, bf16, fp16.")] = "auto",
    quantize: Annotated[
        str, typer.Option(help="Load the model quantized, as an adapter was trained: none, nf4, int8.")
    ] = "none",
) -> None:
    """Answer a prompt, or a file of them, rendered exactly as in training.

    lora generate org/base --adapter my-adapter --prompt "..."
    """
    if (prompt is None) == (input_file is None):
        raise LoraError("give either --prompt TEXT or --input FILE")
    if (input_file is None) != (output is None):
        raise LoraError("--input and --output go together: --input rows.jsonl --output answers.jsonl")

    from ..data.rows import read_rows
    from ..files.commit import replaced
    from ..train import generation
    from .console import clean_warnings

    rows = read_rows(input_file, "input") if input_file is not None else []
    prompts = generation.row_prompts(rows) if prompt is None else [generation.prompt_as_trained(prompt, adapter)]
    base, tokenizer = _load(model, adapter, dtype, quantize)
    with clean_warnings(), _progress(len(prompts)) as advance:
        answers = generation.generate(
            base, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature,
            seed=seed, on_batch=advance,
        )  # fmt: skip
    if output is None:
        typer.echo(answers[0])
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({**r, "generated": a}, ensure_ascii=False) for r, a in zip(rows, answers, strict=True)]
        with replaced(output) as file:
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        typer.echo(f"{len(answers)} answers: {output}")


def _load(model: str, adapter: Path | None, dtype: str, quantize: str) -> tuple[Any, Any]:
    import torch

    import lora

    from ..train.base import load_base, load_tokenizer, pick_dtype
    from .console import clean_warnings

    tokenizer = load_tokenizer(model)
    with clean_warnings():
        base = load_base(model, pick_dtype(dtype), quantize)
        if adapter is not None:
            lora.load(base, adapter)
    if not getattr(base, "is_quantized", False):  # those are where they belong, and refuse to be moved
        base.to("cuda" if torch.cuda.is_available() else "cpu")
    return base, tokenizer


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar over many prompts; nothing for one."""
    from rich.progress import Progress

    from .console import stderr

    console = stderr()
    with Progress(console=console, transient=True, disable=total == 1 or not console.is_terminal) as bar:
        task = bar.add_task("answering", total=total)
        yield lambda count: bar.advance(task, count)
