"""`lora check`: did it work? The questions that a run asks at its end, asked later."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DataError, LoraError
from .answering import Dtype, Quantize


def check(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    model: Annotated[str, typer.Option(help="Base model: a folder, or a name on the hub.")],
    data: Annotated[str, typer.Option(help="Rows that the adapter should do well on, best held-out ones.")],
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Ask an adapter on disk whether it gives the logits that it was trained to, ends its answers, and beats its base.

    Exit code 6 where it fails one of them.

        lora check my-adapter --model org/base --data rows.jsonl
    """
    from ..data.rows import glance
    from ..train.record import run_record

    record = run_record(adapter)
    glance(data, task="classify" if record.get("labels") else "generate")
    if not adapter.is_dir():
        raise LoraError(f"adapter: the folder {str(adapter)!r} does not exist; give the folder of an adapter")

    from ..train.quiet import quiet
    from .console import clean_warnings

    with quiet():  # what it imports has remarks of its own
        from ..train.outcome import check as examine

    with clean_warnings():
        found = examine(
            adapter, lambda: _base(model, dtype, quantize, record), _probe(record), _material(model, data, record)
        )
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else str(found))
    found.judge(adapter)


def _base(model: str, dtype: str, quantize: str, record: dict[str, Any]) -> Any:
    from .answering import load_answering

    return load_answering(model, None, dtype, quantize, record.get("labels") or ())[0]


def _probe(record: dict[str, Any]) -> Any:
    from ..train.probe import Probe

    if record.get("probe") is None:
        return None
    try:
        return Probe.read(record["probe"])
    except (KeyError, TypeError, ValueError) as error:
        raise LoraError(
            f"adapter: the probe in its run.json is no such record ({error!r}); restore or delete it"
        ) from error


def _material(model: str, data: str, record: dict[str, Any]) -> Any:
    """The rows, encoded as in the run; all of them are asked, and whatever was trained before, it was enough."""
    from ..data.encode import encode_rows
    from ..data.rows import read_rows
    from ..data.template import PromptTemplate
    from ..train.base import load_config, load_tokenizer, max_positions
    from ..train.classify import encode_labelled
    from ..train.defaults import LONGEST
    from ..train.examine import label_loss
    from ..train.outcome import Material

    tokenizer = load_tokenizer(model)
    most = max_positions(load_config(model))
    length = min(int(record.get("max_length") or LONGEST), most or LONGEST)
    if labels := record.get("labels"):
        rows = encode_labelled(read_rows(data), tokenizer, length, labels, "data").rows
        return Material(rows, rows, None, None, "rows", "rows", label_loss)
    template = PromptTemplate(tokenizer, str(record.get("template") or "auto"))
    rows = encode_rows(read_rows(data), template, length, "data").rows
    if not rows:
        raise DataError(f"data: {data!r} has no row that fits into {length} tokens")
    return Material(rows, rows, template, None, "rows", "rows")
