"""`lora chat`: a conversation with a model, with or without an adapter."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LoraError
from .answering import Adapter, Dtype, MaxNewTokens, Model, Quantize, Seed, Temperature, load_answering

if TYPE_CHECKING:
    from ..train.conversation import Conversation

_HELP = """/reset          forget what was said
/system TEXT    set the system turn; without TEXT, none
/save FILE      write the conversation as a row that `lora train` reads
/help           this
Ctrl-D          leave"""


def chat(
    model: Model,
    adapter: Adapter = None,
    system: Annotated[str, typer.Option(help="A system turn before the conversation.")] = "",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
) -> None:
    """Talk to a model; it sees what was said before. Each line is a turn, typed or piped in.

    lora chat org/base --adapter my-adapter
    """
    from ..train.conversation import Conversation
    from ..train.record import style_as_trained
    from .console import clean_warnings

    style = style_as_trained(adapter or model)
    base, tokenizer = load_answering(model, adapter, dtype, quantize, text=True)
    with clean_warnings():
        talk = Conversation(base, tokenizer, style, system, max_new_tokens, temperature, seed)
        _note("/help lists what else can be typed" if _at_terminal() else "")
        _note("" if talk.remembers else "without a chat template each line stands alone: the model sees no earlier one")
        for line in _lines():
            try:
                _turn(talk, line)
            except LoraError as error:
                _note(f"error: {error}")


def _turn(talk: "Conversation", line: str) -> None:
    """One line: a command, or a turn to answer. Raises `LoraError` where neither can be done; the talk goes on."""
    word, _, rest = line.strip().partition(" ")
    if not word:
        return
    if not word.startswith("/"):
        _answer(talk, line.strip())
    elif word == "/reset":
        talk.reset()
        _note("forgotten")
    elif word == "/system":
        talk.instruct(rest.strip())
        _note("the system turn is set" if rest.strip() else "no system turn")
    elif word == "/save":
        _save(talk, rest.strip())
    elif word == "/help":
        _note(_HELP)
    else:
        raise LoraError(f"there is no command {word!r}; /help lists them")


def _answer(talk: "Conversation", text: str) -> None:
    def show(piece: str) -> None:
        typer.echo(piece, nl=False)
        sys.stdout.flush()

    try:
        _, left_out = talk.ask(text, show)
    except KeyboardInterrupt:
        typer.echo()
        _note("stopped; neither your line nor the answer is remembered")
        return
    typer.echo()
    if left_out:
        _note(f"the oldest {left_out} turns no longer fit and were left out of the prompt; /reset forgets all")


def _save(talk: "Conversation", name: str) -> None:
    from ..files.commit import replaced

    if not name:
        raise LoraError("/save needs a file: /save talk.jsonl")
    path, row = Path(name), talk.row()
    if path.exists():
        raise LoraError(f"{name!r} is there already; give another name")
    try:
        with replaced(path) as file:
            file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise LoraError(f"{name!r} cannot be written: {error}") from error
    _note(f"saved: {name}")


def _lines() -> Iterator[str]:
    """Typed lines behind a mark, with the terminal's editing; or the lines of a pipe."""
    if not _at_terminal():
        yield from (raw.decode("utf-8", "surrogateescape") for raw in sys.stdin.buffer)
        return
    with suppress(ImportError):  # gives `input` the arrow keys and a history, where there is one
        import readline  # noqa: F401

    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return


def _at_terminal() -> bool:
    return sys.stdin.isatty()


def _note(text: str) -> None:
    if text:
        typer.echo(text, err=True)
