"""`lora data`: a look at rows before they are trained on."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..data.preview import Preview

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at training rows.")


@app.callback()
def data() -> None:
    """Look at training rows before a run."""


@app.command()
def preview(
    source: Annotated[str, typer.Argument(help="Rows, in any form that `lora train` reads.", metavar="FILE")],
    model: Annotated[str, typer.Option(help="Whose tokenizer to use: a folder, or a name on the hub.")],
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 3,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest row in tokens [default: what the model takes, at most 2048].")
    ] = None,
    template: Annotated[str, typer.Option(help="How a prompt is written: auto, chat, plain, inst.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show rows as a run would see them: what is trained, what is only read, and what is left out.

    Only the tokenizer is loaded.

        lora data preview rows.jsonl --model org/base
    """
    from ..data.rows import read_rows
    from .console import clean_warnings

    with clean_warnings():
        found = read_rows(source)  # before the imports that take seconds

        from ..data.preview import preview as look
        from ..data.template import PromptTemplate
        from ..train.base import load_tokenizer

        made = PromptTemplate(load_tokenizer(model), template)
        seen = look(found, made, max_length or _longest(model), repr(source))
    if as_json:
        typer.echo(json.dumps(seen.to_json(rows), ensure_ascii=False, indent=2))
        return
    _show(seen, rows)


def _longest(model: str) -> int:
    from ..train.base import load_config, max_positions
    from ..train.defaults import LONGEST

    return min(max_positions(load_config(model)) or LONGEST, LONGEST)


def _show(seen: "Preview", count: int) -> None:
    from rich.console import Console
    from rich.text import Text

    from ..data.preview import CLOSE, COUNTED, OPEN, marked, printable

    console = Console(soft_wrap=True, highlight=False)
    colours = console.is_terminal and not console.no_color

    def say(text: str) -> None:
        console.print(Text(printable(text)))

    say(f"format: {seen.data.format}, {seen.rows:,} rows; template: {seen.template.style}")
    if seen.data.read < seen.rows:
        say(f"counted: {seen.data.read:,} rows, taken evenly (at most {COUNTED:,})")
    say(f"tokens of a row: {seen.tokens} (max_length {seen.data.max_length:,}); trained: {seen.trained}")
    say(str(seen.data))
    if count:
        how = "in green, the rest is dim" if colours else f"between {OPEN} and {CLOSE}"
        say(f"\nwhat is trained stands {how}")
    for number, example in enumerate(seen.examples(count), 1):
        say(f"\n--- {number} ---")
        if colours:
            parts = [(printable(text), "bold green" if trained else "dim") for text, trained in example]
            console.print(Text.assemble(*parts))
        else:
            say(marked(example))
