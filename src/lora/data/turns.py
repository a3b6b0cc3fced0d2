"""Turns of a conversation as people write them, in one form: roles, content parts, tool calls, thoughts, marks."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ..errors import DataError
from .sound import shown
from .specials import fenced


class _Turn(TypedDict):
    role: str
    content: str


class Message(_Turn, total=False):
    """One turn, as chat templates expect it; the role is system, user, assistant or tool.

    A tool call is `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with its `id` if it had one.
    """

    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str
    reasoning_content: str


@dataclass(frozen=True)
class Turn:
    """A turn that was read: the message, whether it may be trained, and the fields that say nothing to us."""

    message: Message
    trained: bool = True
    unused: tuple[str, ...] = ()


ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")}, "developer": "system", "function": "tool"
}  # fmt: skip
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "tool": "tool", "function_call": "assistant",
    "observation": "tool", "developer": "system",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")  # the names that APIs and templates have for a thought
MARKS = ("weight", "train")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_turns(turns: Any, field: str, roles: Mapping[str, str]) -> list[Turn]:
    """Raises `DataError` for what is no list of turns with a role and a text, and names the turn."""
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f"{field} must be a list of at least one turn, got {shown(turns)}")
    keys = ("from", "value") if roles is SHAREGPT_ROLES else ("role", "content")
    if isinstance(turns[0], dict) and "role" in turns[0]:  # under sharegpt's field name as well, in some sets
        keys = ("role", "content")
    read = []
    for number, turn in enumerate(turns, 1):
        try:
            read.append(_read_turn(turn, *keys, roles))
        except DataError as error:
            raise DataError(f"{field}, turn {number}: {error}") from error
    return read


def _read_turn(turn: Any, role_key: str, text_key: str, roles: Mapping[str, str]) -> Turn:
    # What Arrow fills in where other turns have a field is no field of this one.
    fields = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    calls = fields.get("tool_calls") or fields.get("function_call")
    if role_key not in fields or not (text_key in turn or calls):
        raise DataError(f"needs {role_key!r} and {text_key!r}, got {shown(turn)}")
    asked = fields[role_key]
    if not isinstance(asked, str) or asked not in roles:
        raise DataError(f"{role_key} is {shown(asked)}; allowed: {', '.join(roles)}")
    refuse_media(fields)
    role = roles[asked]
    content, thought = "", next((text(fields, name) for name in REASONING if fields.get(name)), "")
    if asked == "function_call":
        calls = _parsed(fields[text_key], "a function_call")
    elif role == "tool" and not isinstance(turn.get(text_key), str):
        content = _tool_result(turn.get(text_key))
    elif text_key in fields or not (calls or thought):
        content, thought_part = content_of(turn, text_key)
        thought = thought or thought_part
    message = Message(role=role, content=content)
    if calls:
        if role != "assistant":
            raise DataError(f"a tool call stands in a turn of the {role}; only the assistant calls tools")
        message["tool_calls"] = [_tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    if thought:
        message["reasoning_content"] = thought
    if "name" in fields:
        message["name"] = text(fields, "name")
    if "tool_call_id" in fields:
        message["tool_call_id"] = text(fields, "tool_call_id")
    known = {role_key, text_key, "tool_calls", "function_call", "name", "tool_call_id", *REASONING, *MARKS}
    return Turn(message, marked(fields, role), tuple(key for key in fields if key not in known))


def marked(fields: Mapping[str, Any], role: str = "assistant") -> bool:
    """Whether a turn or row may be trained, by its marks `weight` (0 or 1) and `train` (true or false).

    Raises:
        DataError: a mark of another value, or one that asks to train what is no answer.
    """
    answer = True
    for name, value in ((name, fields[name]) for name in MARKS if fields.get(name) is not None):
        if isinstance(value, str) and value.lower() in ("true", "false", "0", "1"):  # a .csv has no other types
            value = value.lower() in ("true", "1")
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(f"{name} is {shown(value)}; a turn or row is trained or not: give 0 or 1, false or true")
        if name == "train" and value and role != "assistant":
            raise DataError(f"train is true in a turn of the {role}; only the assistant's turns can be trained")
        answer = answer and bool(value)
    return answer


def refuse_media(fields: Mapping[str, Any]) -> None:
    for name in MEDIA:
        if fields.get(name):
            raise DataError(f"it has {name!r}, and only text can be trained on; take such rows out")


def content_of(holder: Mapping[str, Any], field: str) -> tuple[str, str]:
    """The text of a field that may be a list of content parts, and the thoughts among them."""
    if not isinstance(holder[field], (list, tuple)):
        return text(holder, field), ""
    texts, thoughts = [], []
    for number, part in enumerate(holder[field], 1):
        fields = {"text": part} if isinstance(part, str) else part
        if not isinstance(fields, dict):
            raise DataError(f"{field}, part {number}: needs a type and a text, got {shown(part)}")
        kind = fields.get("type") or "text"
        if kind in ("thinking", "reasoning"):
            thoughts.append(text(fields, "thinking" if "thinking" in fields else "text"))
        elif kind in _TEXT_PARTS and "text" in fields:
            texts.append(text(fields, "text"))
        else:
            raise DataError(f"{field}, part {number} is {shown(kind)}; only text parts can be trained on")
    return "".join(texts), "".join(thoughts)


def text(holder: Mapping[str, Any], field: str) -> str:
    value = holder.get(field)
    if not isinstance(value, str):
        raise DataError(f"{field} is {type(value).__name__} ({shown(value, 60)}); it must be text")
    return value


def _tool_result(value: Any) -> str:
    """A tool's answer: APIs write text or text parts, some sets the object that the tool gave."""
    if isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value):
        return content_of({"content": value}, "content")[0]
    return json.dumps(value, ensure_ascii=False)


def _tool_call(call: Any) -> dict[str, Any]:
    """One call in the form of the templates, whose arguments are an object (APIs write them as JSON text)."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"a tool call needs a function with a name, got {shown(call)}")
    if call.get("type") not in (None, "function"):
        raise DataError(f"a tool call's type is {shown(call['type'])}; only 'function' is known")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", "the arguments of a tool call")
    if arguments is not None and not isinstance(arguments, dict):
        raise DataError(f"the arguments of the tool call {function['name']!r} are {shown(arguments)}; give an object")
    read = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return read if call.get("id") is None else {"id": str(call["id"]), **read}


def for_template(
    message: Message, pattern: re.Pattern[str] | None, *, in_parts: bool = False, arguments_as_text: bool = False
) -> dict[str, Any]:
    """The message as a chat template takes it, special tokens in its texts fenced.

    A thought goes by both names that templates have for it. `in_parts` makes the content a list of one text part,
    `arguments_as_text` writes the arguments of tool calls as JSON text.
    """
    turn: dict[str, Any] = fenced(dict(message), pattern)
    if "reasoning_content" in turn:
        turn["thinking"] = turn["reasoning_content"]
    if in_parts:
        turn["content"] = [{"type": "text", "text": turn["content"]}]
    if arguments_as_text:
        for call in turn.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return turn


def read_tools(value: Any, field: str) -> tuple[dict[str, Any], ...]:
    """The tools that a row offers, each `{"type": "function", "function": {...}}`; JSON text is parsed."""
    given = _parsed(value, field) if isinstance(value, str) and value.strip() else value
    if not given:
        return ()
    tools: Sequence[Any] = given if isinstance(given, (list, tuple)) else [given]
    wrapped = [tool if isinstance(tool, dict) and "function" in tool else {"function": tool} for tool in tools]
    for tool, whole in zip(tools, wrapped, strict=True):
        if not isinstance(whole["function"], dict) or not isinstance(whole["function"].get("name"), str):
            raise DataError(f"{field}: a tool needs a name, got {shown(tool)}")
    return tuple({"type": "function", **tool} for tool in wrapped)


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} must be JSON, got {shown(value)}: {error}") from error
