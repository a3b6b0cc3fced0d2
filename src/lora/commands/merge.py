"""`lora merge`: base and adapter into one plain model on disk."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LoraError
from ..train.places import published
from ..train.record import MERGE_FILE, kept_record

WORST = 5  # modules shown after a merge, those that kept least; a large model has hundreds


def merge(
    model: Annotated[str, typer.Argument(help="Base model: a folder, or a name on the hub.")],
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for the merged model.")],
    dtype: Annotated[
        str, typer.Option(help="Type of the merged weights: auto (the base's own), fp32, bf16, fp16.")
    ] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Use OUT although it holds something else; that is moved aside.")
    ] = False,
) -> None:
    """Fold an adapter into its base and save a plain model, which needs no lora to run.

    Merge into the base that is not quantized, also when the adapter was trained on a quantized one. Where the base is
    stored quantized, the layers that the adapter changes become 16-bit ones.

    lora merge org/base my-adapter merged
    """
    _check_out(out, [Path(model), adapter], force)
    _check_form(adapter)

    import lora

    from ..exact import MergeReport
    from ..train.base import load_tokenizer
    from ..train.quiet import quiet
    from .answering import load_adapter
    from .console import clean_warnings

    tokenizer, trained = load_tokenizer(model), kept_record(adapter)
    with clean_warnings():
        merged = _base(model, tokenizer, dtype, trained.get("labels", []))
        load_adapter(merged, adapter)
        report = lora.merge(merged, unload=True)
    worst = sorted(report.modules, key=lambda module: module.kept)[:WORST]
    rest = len(report.modules) - len(worst)
    typer.echo(str(MergeReport(worst)) + (f"\nand {rest} modules that kept more" if rest else ""))
    with new_folder(out) as folder, quiet():
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record = {
            "base": published(model), "adapter": published(str(adapter)),
            "dtype": str(merged.dtype).removeprefix("torch."), "lora": lora.__version__, "trained": trained,
            "files": sorted([MERGE_FILE, *(file.name for file in folder.iterdir())]),
        }  # fmt: skip
        (folder / MERGE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    typer.echo(f"merged model: {out}")


def _base(model: str, tokenizer: Any, dtype: str, labels: list[str]) -> Any:
    """The base that the adapter is for. On the CPU even when it is stored quantized: what comes out is larger."""
    from ..train.base import load_base, pick_dtype
    from ..train.classify import load_classifier

    kind = "auto" if dtype == "auto" else pick_dtype(dtype)
    if labels:
        return load_classifier(model, labels, tokenizer, kind, device="cpu")
    return load_base(model, kind, device="cpu")


def _check_out(out: Path, sources: list[Path], force: bool) -> None:
    """Raises `LoraError` when writing `out` would take the place of something that is not an earlier merge."""
    if out.exists() and not out.is_dir():
        raise LoraError(f"out: {str(out)!r} is a file; give a folder")
    target = out.resolve()
    for source in sources:
        if source.exists() and (target == source.resolve() or target in source.resolve().parents):
            raise LoraError(
                f"out: {str(out)!r} is or holds {str(source)!r}, which is being merged; give another folder"
            )
    if out.is_dir() and any(out.iterdir()) and not (out / MERGE_FILE).is_file() and not force:
        raise LoraError(
            f"out: {str(out)!r} is not empty and not from an earlier merge; give another folder, or --force to move "
            "what is there aside"
        )


def _check_form(adapter: Path) -> None:
    """Raises `LoraError` for an adapter that is no change of weights, before its base is loaded."""
    from ..files.adapter import reading

    if reading(adapter, lambda file: str(file.config["peft_type"])) == "ADAPTION_PROMPT":
        raise LoraError(
            f"adapter: {str(adapter)!r} holds prompts that every query attends to (LLaMA-Adapter); they are no change "
            "of a weight, so they cannot be merged. lora generate, chat and eval take it beside its base"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Gives a fresh folder beside `out` that takes its place once all is written; on failure nothing is left.

    An earlier merge in `out` is deleted; whatever holds a file that is not its own is moved to `<out>.old-...`.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".tmp", f".{out.name}.", out.parent, ignore_cleanup_errors=True) as beside:
        fresh = Path(beside, out.name)
        fresh.mkdir()
        yield fresh
        _take_place(fresh, out)


def _take_place(fresh: Path, out: Path) -> None:
    if not out.exists():
        os.rename(fresh, out)
        return
    # A name that nothing else has; renaming onto an empty folder replaces it.
    aside = Path(tempfile.mkdtemp(prefix=f"{out.name}.old-", dir=out.parent))
    os.rename(out, aside)
    try:
        os.rename(fresh, out)
    except BaseException:
        os.rename(aside, out)
        raise
    try:  # what the merge wrote there, by its own record
        record = json.loads((aside / MERGE_FILE).read_text(encoding="utf-8"))
        own, was = set(record["files"]), f"{record.get('adapter')} into {record.get('base')}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        own, was = set(), ""
    if not any(aside.iterdir()):
        aside.rmdir()
    elif {file.name for file in aside.iterdir()} <= own:
        shutil.rmtree(aside)
        typer.echo(f"replaced in {out}: an earlier merge of {was}", err=True)
    else:
        typer.echo(f"what was in {out} is now in {aside}", err=True)
