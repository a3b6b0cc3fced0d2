"""`lora generate`: answers from a model, with or without an adapter."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DataError, LoraError
from .answering import (
    Adapter,
    BatchSize,
    Dtype,
    MaxNewTokens,
    Model,
    Quantize,
    Seed,
    Temperature,
    check_target,
    load_answering,
    progress,
    write_lines,
)


def generate(
    model: Model,
    adapter: Adapter = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt, and more by giving the flag again; - reads one a line from stdin."),
    ] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help="Rows to answer, in any format that `lora train` reads.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the rows go as .jsonl, each with a field `generated`.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show answers as they grow, one prompt at a time.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: BatchSize = 16,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
) -> None:
    """Answer prompts, or a file of rows, rendered exactly as in training.

    One prompt's answer goes to stdout as it is; those of several as rows of JSON, with the fields prompt and generated.

        lora generate org/base --adapter my-adapter --prompt "..."
    """
    _check(bool(prompt), {"input": input_file, "model": model, "adapter": adapter}, output, stream)
    typed = [text for given in prompt or () for text in (_lines_of_stdin() if given == "-" else [given])]

    from ..data.rows import read_rows
    from ..train import generation
    from ..train.record import prompt_as_trained, style_as_trained
    from .console import clean_warnings

    rows = read_rows(input_file, "input") if input_file is not None else [{"prompt": text} for text in typed]
    trained = adapter or model
    prompts = [prompt_as_trained(text, trained) for text in typed] or generation.row_prompts(rows)
    base, tokenizer = load_answering(model, adapter, dtype, quantize, text=True)
    with clean_warnings(), progress(1 if stream else len(prompts)) as advance:
        answers = generation.generate(
            base, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature,
            seed=seed, style=style_as_trained(trained), on_batch=advance, on_text=_Stream().show if stream else None,
        )  # fmt: skip
    if stream:
        typer.echo()
    elif output is not None:
        _write(output, rows, answers)
    else:
        typer.echo(answers[0] if len(answers) == 1 else "\n".join(_answered(rows, answers)))


def _check(prompted: bool, read: dict[str, Any], output: Path | None, stream: bool) -> None:
    input_file = read["input"]
    if prompted == (input_file is not None):
        raise LoraError("give either --prompt TEXT or --input FILE")
    if (input_file is None) != (output is None):
        raise LoraError("--input and --output go together: --input rows.jsonl --output answers.jsonl")
    if stream and output is not None:
        raise LoraError("--stream shows answers on stdout, and --output writes them to a file; give one of the two")
    check_target("output", output, read)


def _write(output: Path, rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> None:
    write_lines(output, _answered(rows, answers))
    typer.echo(f"{len(answers)} answers: {output}")


def _answered(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> list[str]:
    return [json.dumps({**row, "generated": a}, ensure_ascii=False) for row, a in zip(rows, answers, strict=True)]


def _lines_of_stdin() -> list[str]:
    """The prompts that are piped in, one a line; the last may end without a line's end."""
    try:
        lines = sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"prompt: stdin is not UTF-8 text ({error})") from error
    lines = [line.removesuffix("\r") for line in lines]
    if lines == [""]:
        raise DataError("prompt: stdin holds no line; give one prompt a line")
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise DataError(f"prompt: line {empty[0]} of stdin is empty; give one prompt a line")
    return lines


class _Stream:
    """Pieces of answers to stdout; of several, each answer starts on its own line after an empty one."""

    def __init__(self) -> None:
        self.now = 0

    def show(self, index: int, piece: str) -> None:
        if index != self.now:
            typer.echo("\n" * (index - self.now + 1), nl=False)
            self.now = index
        typer.echo(piece, nl=False)
        sys.stdout.flush()
