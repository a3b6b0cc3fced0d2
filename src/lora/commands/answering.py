"""What the commands that answer share: their common flags, and the model with its adapter, ready to run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Base or merged model: a folder, or a name on the hub.")]
Adapter = Annotated[Path | None, typer.Option(help="Adapter folder; without it the model answers alone.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer in tokens.")]
BatchSize = Annotated[int, typer.Option(help="Prompts answered at a time.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.")]
Seed = Annotated[int, typer.Option(help="Seeds the sampling.")]
Dtype = Annotated[str, typer.Option(help="Type of the weights: auto, fp32, bf16, fp16.")]
Quantize = Annotated[str, typer.Option(help="Load the model quantized, as an adapter was trained: none, nf4, int8.")]


def load_answering(
    model: str, adapter: Path | None, dtype: str, quantize: str, labels: Sequence[str] = ()
) -> tuple[Any, Any]:
    """The model with the adapter acting, on the GPU where there is one, and its tokenizer.

    labels: their names make it a sequence classifier.
    """
    import torch

    import lora

    from ..train.base import load_base, load_tokenizer, pick_dtype
    from ..train.classify import load_classifier
    from .console import clean_warnings

    tokenizer = load_tokenizer(model)
    with clean_warnings():
        if labels:
            base = load_classifier(model, labels, tokenizer, pick_dtype(dtype), quantize)
        else:
            base = load_base(model, pick_dtype(dtype), quantize)
        if adapter is not None:
            lora.load(base, adapter)
    if not getattr(base, "is_quantized", False):  # those are where they belong, and refuse to be moved
        base.to("cuda" if torch.cuda.is_available() else "cpu")
    return base, tokenizer


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar over many rows; nothing for one."""
    from rich.progress import Progress

    from .console import stderr

    console = stderr()
    with Progress(console=console, transient=True, disable=total == 1 or not console.is_terminal) as bar:
        task = bar.add_task("answering", total=total)
        yield lambda count: bar.advance(task, count)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A file of these lines, written whole, in a folder that is made where it is not there."""
    from ..files.commit import replaced

    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
