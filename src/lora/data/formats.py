"""What a row means: the formats that people bring, read into one form."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict

from ..errors import DataError
from .rows import Row


class Message(TypedDict):
    """One turn; the role is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One row, read: a conversation, or a plain text (then `messages` is empty)."""

    messages: tuple[Message, ...] = ()
    text: str = ""


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
_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "tool": "tool",
}  # fmt: skip
_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}


@dataclass(frozen=True)
class RowFormat:
    """A way to write a row: the fields that name it, of which a prompt needs the first alone, and its reader."""

    name: str
    fields: tuple[str, ...]
    read: Callable[[Row, bool], Example]


def detect(row: Row, *, answers: bool = True) -> RowFormat:
    """The format of a row, by its fields. With `answers=False`, a row may lack its answer (to be generated).

    Raises:
        DataError: the fields fit no format; the message lists all of them.
    """
    for known in FORMATS:
        if all(field in row for field in (known.fields if answers else known.fields[:1])):
            return known
    allowed = "; ".join(" + ".join(known.fields) for known in FORMATS)
    raise DataError(f"the fields {', '.join(map(repr, row)) or '(none)'} fit no known format; allowed: {allowed}")


def typed_prompt(text: str, format_name: str | None = None) -> Example:
    """A prompt that was typed, in the form that a training row of that format would have had."""
    if format_name == "text":
        return Example(text=text)
    content = _ALPACA_NO_INPUT.format(instruction=text) if format_name == "alpaca" else text
    return Example(messages=(Message(role="user", content=content),))


def _read_conversation(field: str, roles: dict[str, str], row: Row, answers: bool) -> Example:
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{field} must be a list of at least one turn, got {turns!r:.80}")
    role_key, text_key = ("role", "content") if field == "messages" else ("from", "value")
    if isinstance(turns[0], dict) and "role" in turns[0]:  # under sharegpt's field name as well, in some sets
        role_key, text_key = "role", "content"
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise DataError(f"{field}, turn {number}: needs {role_key!r} and {text_key!r}, got {turn!r:.80}")
        if turn[role_key] not in roles:
            raise DataError(f"{field}, turn {number}: {role_key} is {turn[role_key]!r}; allowed: {', '.join(roles)}")
        messages.append(Message(role=roles[turn[role_key]], content=_text(turn, text_key)))
    if not answers:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError(f"{field} has no turn before the answer; a prompt needs one")
    elif not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{field} has no assistant turn, so there is nothing to train on")
    return Example(messages=tuple(messages))


def _read_alpaca(row: Row, answers: bool) -> Example:
    context = "" if row.get("input") is None else _text(row, "input")
    template = _ALPACA_WITH_INPUT if context.strip() else _ALPACA_NO_INPUT
    return _turns(template.format(instruction=_text(row, "instruction"), input=context), "output", row, answers)


def _read_pair(prompt_field: str, answer_field: str, row: Row, answers: bool) -> Example:
    return _turns(_text(row, prompt_field), answer_field, row, answers)


def _turns(prompt: str, answer_field: str, row: Row, answers: bool) -> Example:
    user = Message(role="user", content=prompt)
    answer = [Message(role="assistant", content=_text(row, answer_field))] if answers else []
    return Example(messages=(user, *answer))


def _read_text(row: Row, answers: bool) -> Example:
    text = _text(row, "text")
    if not text.strip():
        raise DataError("text is empty, so there is nothing to train on")
    return Example(text=text)


def _text(holder: dict[str, Any], field: str) -> str:
    value = holder[field]
    if not isinstance(value, str):
        raise DataError(f"{field} is {type(value).__name__} ({value!r:.60}); it must be text")
    return value


# In order of preference: a row that carries several (Alpaca's sets repeat all as `text`) is the first that fits.
FORMATS: tuple[RowFormat, ...] = (
    RowFormat("messages", ("messages",), partial(_read_conversation, "messages", _ROLES)),
    RowFormat("sharegpt", ("conversations",), partial(_read_conversation, "conversations", _SHAREGPT_ROLES)),
    RowFormat("alpaca", ("instruction", "output"), _read_alpaca),
    *(
        RowFormat(f"{prompt}/{answer}", (prompt, answer), partial(_read_pair, prompt, answer))
        for prompt, answer in (("prompt", "completion"), ("context", "target"), ("question", "answer"))
    ),
    RowFormat("text", ("text",), _read_text),
)
