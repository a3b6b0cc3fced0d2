"""What the commands that answer share: their common flags, and the model with its adapter, ready to run."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LoraError

# What `lora.load` advises, in Python's words, and what there is to do in a command.
_ADVICE = {
    "load it on that, or if that is meant, lora.load(..., check=False)": "give the base that it was trained on",
    "if that is meant, lora.load(..., check=False)": "copy the adapter again, whole",
    "If that is meant, lora.load(..., check=False)": "Train it again, or copy it again",
}

Model = Annotated[str, typer.Argument(help="Base or merged model: a folder, or a name on the hub.")]
Adapter = Annotated[Path | None, typer.Option(help="Adapter folder; without it the model answers alone.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer in tokens.")]
BatchSize = Annotated[int, typer.Option(help="Prompts answered at a time.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.")]
Seed = Annotated[int, typer.Option(help="Seeds the sampling.")]
Dtype = Annotated[str, typer.Option(help="Type of the weights: auto, fp32, bf16, fp16.")]
Quantize = Annotated[str, typer.Option(help="Load the model quantized, as an adapter was trained: none, nf4, int8.")]


def load_answering(
    model: str, adapter: Path | None, dtype: str, quantize: str, labels: Sequence[str] = (), *,
    text: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """The model with the adapter acting, on the GPU where there is one, and its tokenizer.

    Args:
        labels: their names make it a sequence classifier.
        text: it shall answer with text, which a classifier is refused for.
    """
    import torch

    from ..train.base import load_base, load_tokenizer, pick_dtype
    from ..train.classify import load_classifier
    from .console import clean_warnings

    tokenizer = load_tokenizer(model)
    if text:
        _refuse_classifier(model, adapter)
    with clean_warnings():
        if labels:
            base = load_classifier(model, labels, tokenizer, pick_dtype(dtype), quantize)
        else:
            base = load_base(model, pick_dtype(dtype), quantize)
        if adapter is not None:
            load_adapter(base, adapter)
    if not getattr(base, "is_quantized", False):  # those are where they belong, and refuse to be moved
        base.to("cuda" if torch.cuda.is_available() else "cpu")
    return base, tokenizer


def load_adapter(base: Any, adapter: Path) -> None:
    """`lora.load`, whose errors then say what can be done in a command."""
    import lora

    try:
        lora.load(base, adapter)
    except LoraError as error:
        told = str(error)
        for advice, instead in _ADVICE.items():
            told = told.replace(advice, instead)
        if told == str(error):
            raise
        raise type(error)(told) from error


def _refuse_classifier(model: str, adapter: Path | None) -> None:
    """Raises `LoraError` for a classifier: with tied embeddings it would load as a generator, and answer with noise."""
    from ..train.classify import stored_labels
    from ..train.record import run_record

    if adapter is not None and (run_record(adapter).get("labels") or _task_type(adapter) == "SEQ_CLS"):
        raise LoraError(
            f"adapter: {str(adapter)!r} is a classifier's, which gives labels and no text; lora eval {model} --adapter "
            f"{adapter} --data FILE scores it"
        )
    if run_record(model).get("labels") or stored_labels(model):
        raise LoraError(
            f"model: {model!r} is a classifier, which gives labels and no text; lora eval {model} --data FILE scores it"
        )


def known_labels(adapter: Path | None, labels: list[str]) -> list[str]:
    """The labels. Raises `LoraError` for a classifier's adapter that has none: its outputs would mean nothing."""
    if adapter is not None and not labels and _task_type(adapter) == "SEQ_CLS":
        raise LoraError(
            f"adapter: {str(adapter)!r} is a classifier's, and neither its run.json nor its file says its labels; "
            "restore run.json, or give as model one that is stored as a classifier of these labels"
        )
    return labels


def _task_type(adapter: Path) -> Any:
    """As PEFT's settings have it; None where they cannot be read, which loading tells."""
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return settings.get("task_type") if isinstance(settings, dict) else None


def check_target(argument: str, target: Path | None, sources: Mapping[str, str | Path | None]) -> None:
    """Raises `LoraError` where `target` is a file that the command reads, by whatever name.

    sources: by argument's name, a file or a folder. Of a model or an adapter no .jsonl is read: answers may be there.
    """
    from ..data.readers import READERS, suffix_of

    if target is None or not target.is_file():
        return
    for name, source in sources.items():
        if source is None or "\0" in str(source):
            continue
        path = Path(source)
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if name in ("model", "adapter"):
                read = suffix_of(file) != ".jsonl"
            elif name == "task_dir":
                read = "_test" in file.name  # as all of FinLoRA's
            else:
                read = file == path or (suffix_of(file) in READERS and not file.name.startswith((".", "_")))
            if read and file.is_file() and file.samefile(target):
                raise LoraError(f"{argument}: {str(target)!r} is read as {name} and would be lost; give another file")


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
