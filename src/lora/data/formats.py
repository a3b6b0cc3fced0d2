"""What a row means: the formats that people bring, read into one form."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import DataError
from .sound import Row, shown
from .turns import (
    MARKS,
    REASONING,
    ROLES,
    SHAREGPT_ROLES,
    Message,
    Turn,
    marked,
    read_tools,
    read_turns,
    refuse_media,
    text,
)  # fmt: skip

__all__ = ["FORMATS", "Example", "Message", "RowFormat", "detect", "typed_prompt"]


@dataclass(frozen=True)
class Example:
    """One row, read: a conversation, or a plain text (then `messages` is empty).

    `tools` are those that the conversation may call. `untrained` are the answers (indices into `messages`) that are
    read and not trained, by the row's own marks or as part of its prompt; `left_out` says the whole row is marked so.
    `unused` names the row's fields that mean nothing to training.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()
    left_out: bool = False
    unused: tuple[str, ...] = ()


# Stanford Alpaca's two prompts, as published.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_TOOLS = ("tools", "functions")
# Fields that any conversation may have beside those of its format.
_COMMON = ("system", "history", *_TOOLS, *MARKS)


@dataclass(frozen=True)
class RowFormat:
    """A way to write a row: the fields that name it, of which a prompt needs the first alone, and its reader.

    `turns` gives the turns of a row, with or without its answers; None for a plain text. `more` are fields that the
    reader looks at where they are there.
    """

    name: str
    fields: tuple[str, ...]
    turns: Callable[[Row, bool], list[Turn]] | None
    more: tuple[str, ...] = ()

    def read(self, row: Row, answers: bool) -> Example:
        """The row as an example, with its answers or up to the last one.

        Raises:
            DataError: a field that cannot be read or honoured, by its name.
        """
        row = {name: value for name, value in row.items() if value is not None or name in self.fields}
        refuse_media(row)
        if answers:
            _refuse_label(row, self.turns is None)
        used = {*self.fields, *self.more, *(MARKS if self.turns is None else _COMMON)}
        unused = tuple(name for name in row if name not in used)
        left_out = not marked(row)
        if self.turns is None:
            if not text(row, "text").strip():
                raise DataError("text is empty, so there is nothing to train on")
            return Example(text=row["text"], left_out=left_out, unused=unused)
        turns = _joined(_before(row), self.turns(row, answers))
        if not answers:
            while turns and turns[-1].message["role"] == "assistant":
                turns.pop()
            if not turns:
                raise DataError(f"{self.fields[0]} has no turn before the answer; a prompt needs one")
        answered = [index for index, turn in enumerate(turns) if turn.message["role"] == "assistant"]
        if answers and not answered:
            raise DataError(f"{self.fields[-1]} has no assistant turn, so there is nothing to train on")
        untrained = frozenset(index for index in answered if not turns[index].trained)
        inner = dict.fromkeys(f"{self.fields[0]}.{name}" for turn in turns for name in turn.unused)
        tools = next((read_tools(row[name], name) for name in _TOOLS if name in row), ())
        return Example(
            messages=tuple(turn.message for turn in turns), tools=tools, untrained=untrained,
            left_out=left_out or (answers and len(untrained) == len(answered)), unused=(*unused, *inner),
        )  # fmt: skip


def detect(row: Row, *, answers: bool = True) -> RowFormat:
    """The format of a row, by its fields. With `answers=False`, a row may lack its answer (to be generated).

    Raises:
        DataError: the fields fit no format; the message lists all of them.
    """
    for known in FORMATS:
        if all(field in row for field in (known.fields if answers else known.fields[:1])):
            return known
    allowed = "; ".join(" + ".join(known.fields) for known in FORMATS)
    names = ", ".join(map(shown, list(row)[:12])) or "(none)"
    if answers and "chosen" in row and "rejected" in row:
        names += " (pairs of preferences, which are for DPO: see docs/integrations.md)"
    elif answers and "label" in row:
        names += " (a text and its label are for --task classify)"
    raise DataError(f"the fields {names} fit no known format; allowed: {allowed}")


def typed_prompt(text: str, format_name: str | None = None) -> Example:
    """A prompt that was typed, in the form that a training row of that format would have had."""
    if format_name == "text":
        return Example(text=text)
    content = _ALPACA_NO_INPUT.format(instruction=text) if format_name == "alpaca" else text
    return Example(messages=(Message(role="user", content=content),))


def _refuse_label(row: Row, is_text: bool) -> None:
    """A label that somebody meant to be learned, and that training on answers would drop."""
    label = row.get("label")
    if label is None:
        return
    if is_text:
        raise DataError(
            "it has a text and a 'label', which are for --task classify; to train the label as an answer, write the "
            "row as prompt and completion, and to train on the text alone, take the label out"
        )
    if isinstance(label, bool):
        raise DataError(
            "its 'label' is true or false, which marks answers as wanted or unwanted (for KTO); unwanted answers "
            "would be trained: take those rows and the label out"
        )


def _before(row: Row) -> list[Turn]:
    """The turns that stand in fields of their own: the system's, and earlier ones as question and answer."""
    turns = [Turn(Message(role="system", content=text(row, "system")))] if row.get("system") else []
    history = row.get("history", [])
    if not isinstance(history, (list, tuple)):
        raise DataError(f"history is {shown(history)}; give a list of [question, answer]")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise DataError(f"history, entry {number} must be [question, answer], got {shown(pair)}")
        turns += [_user(pair[0]), Turn(Message(role="assistant", content=pair[1]))]
    return turns


def _joined(before: list[Turn], turns: list[Turn]) -> list[Turn]:
    if before and before[0].message["role"] == turns[0].message["role"] == "system":
        if before[0].message["content"] != turns[0].message["content"]:
            raise DataError("it has a field 'system' and a system turn, which differ; keep one")
        del turns[0]
    return before + turns


def _conversation(field: str, roles: Mapping[str, str], row: Row, answers: bool) -> list[Turn]:
    return read_turns(row[field], field, roles)


def _alpaca(row: Row, answers: bool) -> list[Turn]:
    context = text(row, "input") if "input" in row else ""
    template = _ALPACA_WITH_INPUT if context.strip() else _ALPACA_NO_INPUT
    prompt = template.format(instruction=text(row, "instruction"), input=context)
    return [_user(prompt), *(_answer(row, "output") if answers else [])]


def _pair(prompt_field: str, answer_field: str, row: Row, answers: bool) -> list[Turn]:
    """A prompt and its answer, each a text or a list of messages; answers within the prompt are not trained."""
    if isinstance(row[prompt_field], list):
        prompt = [Turn(turn.message, False, turn.unused) for turn in read_turns(row[prompt_field], prompt_field, ROLES)]
    else:
        prompt = [_user(text(row, prompt_field))]
    return [*prompt, *(_answer(row, answer_field) if answers else [])]


def _user(content: str) -> Turn:
    return Turn(Message(role="user", content=content))


def _answer(row: Row, field: str) -> Sequence[Turn]:
    if isinstance(row[field], list):
        turns = read_turns(row[field], field, ROLES)
        if turns[-1].message["role"] != "assistant":
            raise DataError(f"{field} ends in a turn of the {turns[-1].message['role']}; it must be the assistant's")
        return turns
    message = Message(role="assistant", content=text(row, field))
    if (thought := next((name for name in REASONING if row.get(name)), None)) is not None:
        message["reasoning_content"] = text(row, thought)
    return [Turn(message)]


# In order of preference: a row that carries several (Alpaca's sets repeat all as `text`) is the first that fits.
FORMATS: tuple[RowFormat, ...] = (
    RowFormat("messages", ("messages",), partial(_conversation, "messages", ROLES)),
    RowFormat("sharegpt", ("conversations",), partial(_conversation, "conversations", SHAREGPT_ROLES)),
    RowFormat("alpaca", ("instruction", "output"), _alpaca, ("input", *REASONING)),
    *(
        RowFormat(f"{prompt}/{answer}", (prompt, answer), partial(_pair, prompt, answer), REASONING)
        for prompt, answer in (("prompt", "completion"), ("context", "target"), ("question", "answer"))
    ),
    RowFormat("text", ("text",), None),
)
