"""Where a conversation's answers stand in what the chat template writes, whether or not it marks them itself.

An answer is what the template adds to the prompt of a generation, so the prompt is rendered, the turns with the answer
are rendered, and the first must begin the second. What the template leaves out on the way is told by rendering once
more without it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .formats import Example, Message
from .specials import unfenced
from .template import PromptTemplate

Tools = tuple[dict[str, Any], ...]
EMPTY = "has no trained token: the answer is empty"
LOST_SYSTEM, LOST_TOOLS, LOST_CALLS, LOST_THOUGHTS, OTHER_OPENING = "system", "tools", "calls", "thoughts", "opening"
# What a template may leave out of a row, as it is said after the count of such rows.
LOSSES = {
    LOST_SYSTEM: "the chat template leaves the system turn out, so the model does not see it",
    LOST_TOOLS: "the chat template leaves the row's tools out, so the model does not see them",
    LOST_CALLS: "the chat template leaves the answer's tool calls out; only its text is trained",
    LOST_THOUGHTS: "the template leaves the answer's reasoning out; only its text is trained",
    OTHER_OPENING: "the chat template opens an answer for a generation with more than these answers begin with (such "
    "as a thought's mark); they are trained as written",
}


@dataclass(frozen=True)
class Answer:
    """The rendered prompt, what follows it up to the stop token, and that token; None: eos is to be appended."""

    prompt: str
    text: str
    stop: str | None


def answers(example: Example, template: PromptTemplate) -> tuple[list[Answer], set[str]]:
    """Each answer that is trained, and what the template left out of the row.

    Raises:
        DataError: an answer that is empty, that the template does not end, or whose place cannot be told.
    """
    messages, tools = example.messages, example.tools
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i not in example.untrained]
    if not template.is_chat:  # the answer is the last turn, and the template refuses more than one before it
        ends = [len(messages) - 1]
    found, lost = [], set[str]()
    for end in ends:
        answer, left_out = _answer(messages[: end + 1], tools, template)
        found.append(answer)
        lost |= left_out
    return found, lost | _lost(messages[: ends[-1] + 1], tools, template)


def _answer(messages: Sequence[Message], tools: Tools, template: PromptTemplate) -> tuple[Answer, set[str]]:
    prompt = template.prompt(messages[:-1], tools)
    full = template.render(messages, tools)
    lost = set[str]()
    if not full.startswith(prompt):
        prompt = _shared_opening(messages, tools, template, prompt, full)
        lost.add(OTHER_OPENING)
    last, text = messages[-1], full[len(prompt) :]
    if not (last["content"].strip() or last.get("tool_calls")):
        raise DataError(EMPTY)
    if "tool_calls" in last and _same(full, [*messages[:-1], _without(last, "tool_calls")], tools, template):
        lost.add(LOST_CALLS)
        if not last["content"].strip():
            raise DataError("has no trained token: the chat template leaves the answer's tool calls out")
    if "reasoning_content" in last and _same(
        full, [*messages[:-1], _without(last, "reasoning_content")], tools, template
    ):
        lost.add(LOST_THOUGHTS)
    if _check_written(last["content"], unfenced(text)):
        lost.add(LOST_THOUGHTS)
    stop = _stop(text, last, template)
    if stop is not None:
        text = text[: text.rindex(stop) + len(stop)]
    return Answer(prompt, text, stop), lost


def _check_written(content: str, text: str) -> bool:
    """Whether the template left a thought out that stands in the answer itself, between <think> and </think>.

    Raises:
        DataError: the rest of the answer is not there as it was given. Templates trim it, and no more.
    """
    thought, _, rest = content.rpartition("</think>")
    if rest.strip() not in text:
        raise DataError(f"the chat template changes the answer's text, which ends in {rest.strip()[-32:]!r}")
    return thought.replace("<think>", "").strip() not in text


def _stop(text: str, last: Message, template: PromptTemplate) -> str | None:
    """The special token that ends this answer: the template's, or another one where it ends a tool's call apart."""
    if template.turn_end is None or template.turn_end in text:
        return template.turn_end
    if "tool_calls" in last and template.pattern is not None:
        found = list(template.pattern.finditer(text))
        if found and not text[found[-1].end() :].strip():
            return found[-1][0]
    raise DataError(
        f"its stop token {template.turn_end!r} is not trained: the chat template leaves it out of this answer"
    )


def _shared_opening(messages: Sequence[Message], tools: Tools, template: PromptTemplate, prompt: str, full: str) -> str:
    """Where the answer begins when a generation's prompt opens it with more than training has (a thought's mark)."""
    before = template.render(messages[:-1], tools)
    differ = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
    shared = full[:differ]
    if not (full.startswith(before) and prompt.startswith(before) and len(prompt) > len(before)):
        raise DataError(
            "the chat template writes the prompt differently once the answer follows, so the answer's tokens cannot "
            f"be told apart. Prompt: ...{prompt[-80:]!r}; with the answer: ...{full[-80:]!r}. Correct the template"
        )
    # Not within a token or a word: an answer may happen to begin as the mark does.
    added = "|".join(re.escape(token.content) for token in template.tokenizer.added_tokens_decoder.values())
    marks = re.finditer(f"{added}|\n" if added else "\n", prompt[: len(shared)])
    return shared[: max([len(before), *(mark.end() for mark in marks)])]


def _lost(messages: Sequence[Message], tools: Tools, template: PromptTemplate) -> set[str]:
    if not template.is_chat:
        return {LOST_THOUGHTS} if any("reasoning_content" in message for message in messages) else set()
    lost = set[str]()
    spoken = [message for message in messages if message["role"] != "system"]
    if len(spoken) < len(messages) or tools:
        full = template.render(messages, tools)
        if len(spoken) < len(messages) and _same(full, spoken, tools, template):
            lost.add(LOST_SYSTEM)
        if tools and _same(full, messages, (), template):
            lost.add(LOST_TOOLS)
    return lost


def _same(full: str, messages: Sequence[Message], tools: Tools, template: PromptTemplate) -> bool:
    try:
        return template.render(messages, tools) == full
    except DataError:
        return False


def _without(message: Message, name: str) -> Message:
    return {key: value for key, value in message.items() if key != name}  # type: ignore[return-value]
