"""Rows into token ids and labels: the loss falls on the answers, stop token included, and on nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from ..errors import LoraError
from .formats import Example, Message, RowFormat, detect
from .rows import Row
from .template import PromptTemplate

IGNORED = -100  # what torch's cross-entropy and transformers skip


class Encoded(TypedDict):
    """Token ids (length,) and labels (length,): the id where it is trained, -100 where not."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class EncodedData:
    """Encoded rows, and what had to be left out or taken apart to get them.

    `format` is the rows' format by name, `dropped` counts rows longer than `max_length`, `cut` plain texts that
    were cut into pieces, `split` conversations that became one row per answer.
    """

    rows: list[Encoded]
    format: str
    max_length: int
    read: int
    dropped: int = 0
    longest: int = 0
    cut: int = 0
    split: int = 0
    trained_tokens: int = field(init=False)
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum(len(row["input_ids"]) for row in self.rows)
        self.trained_tokens = sum(label != IGNORED for row in self.rows for label in row["labels"])

    def __str__(self) -> str:
        lines = [
            f"{len(self.rows):,} rows ({self.format}), {self.tokens:,} tokens, {self.trained_tokens:,} of them trained"
        ]
        if self.dropped:
            lines.append(
                f"{self.dropped:,} of {self.read:,} rows are longer than max_length={self.max_length} and were "
                f"left out; the longest has {self.longest:,} tokens"
            )
        if self.cut:
            lines.append(f"{self.cut:,} texts are longer than max_length={self.max_length} and were cut into pieces")
        if self.split:
            lines.append(
                f"{self.split:,} conversations became one row per answer: this chat template writes an earlier "
                "answer differently once more turns follow"
            )
        return "\n".join(lines)


def encode_rows(rows: Sequence[Row], template: PromptTemplate, max_length: int, argument: str = "data") -> EncodedData:
    """Encodes rows of one format, the first row's.

    Rows longer than `max_length` are left out whole, because a cut answer would teach the model not to stop; plain
    texts are cut into pieces instead. Both are counted in the result.

    Raises:
        LoraError: a row of another format, one that cannot be rendered, one without a trained token or whose stop
            token is not trained (the message names the rows), or no row that fits.
    """
    known = _detect(rows[0], argument)
    encoded: list[Encoded] = []
    faults: dict[str, list[int]] = {}
    dropped = cut = split = longest = 0
    for number, row in enumerate(rows, 1):
        try:
            pieces = list(_encode_row(row, known, template))
        except LoraError as error:
            faults.setdefault(str(error), []).append(number)
            continue
        if known.name == "text":
            cut += len(pieces[0]["input_ids"]) > max_length
            encoded.extend(_cut(pieces[0], max_length))
            continue
        split += len(pieces) > 1
        longest = max([longest, *(len(piece["input_ids"]) for piece in pieces)])
        fitting = [piece for piece in pieces if len(piece["input_ids"]) <= max_length]
        dropped += len(fitting) < len(pieces)
        encoded.extend(fitting)
    _raise_faults(faults, argument)
    if not encoded:
        raise LoraError(
            f"{argument}: every row is longer than max_length={max_length} (the longest has {longest} tokens); "
            "raise max_length or shorten the rows"
        )
    return EncodedData(encoded, known.name, max_length, len(rows), dropped, longest, cut, split)


def _detect(row: Row, argument: str) -> RowFormat:
    try:
        return detect(row)
    except LoraError as error:
        raise LoraError(f"{argument}: row 1: {error}") from error


def _raise_faults(faults: dict[str, list[int]], argument: str) -> None:
    """`faults`: the rows, by what is wrong with them."""
    if not faults:
        return
    lines = []
    for fault, numbers in faults.items():
        shown = ", ".join(map(str, numbers[:20])) + (f" and {len(numbers) - 20} more" if len(numbers) > 20 else "")
        lines.append(f"  - row{'s' if len(numbers) > 1 else ''} {shown}: {fault}")
    more = f"\n  - and {len(lines) - 5} other faults" if len(lines) > 5 else ""
    head = f"{argument}: {sum(map(len, faults.values()))} row(s) cannot be trained on; correct or remove them"
    raise LoraError("\n".join([head, *lines[:5]]) + more)


def _encode_row(row: Row, known: RowFormat, template: PromptTemplate) -> Iterator[Encoded]:
    missing = [name for name in known.fields if name not in row]
    if missing:
        raise LoraError(f"lacks {', '.join(missing)}; the first row's format is {known.name}")
    example = known.read(row, True)
    pieces = list(encode_example(example, template))
    for piece in pieces:
        check_trained(piece, template.stop_id if example.messages else template.text_stop_id)
    yield from pieces


def check_trained(row: Encoded, stop_id: int) -> None:
    """Raises `LoraError` unless something but the stop token is trained, and the stop token is trained last."""
    trained = [label for label in row["labels"][1:] if label != IGNORED]  # position 0 predicts nothing
    if not [label for label in trained if label != stop_id]:
        raise LoraError("has no trained token: the answer is empty")
    if trained[-1] != stop_id:
        raise LoraError("its stop token is not trained, so the model would not learn to stop")


def encode_example(example: Example, template: PromptTemplate) -> Iterator[Encoded]:
    """Ids and labels of one example; several when its turns cannot share a row (see `EncodedData.split`)."""
    if not example.messages:
        ids = [*template.text_ids(example.text), template.text_stop_id]
        yield Encoded(input_ids=ids, labels=list(ids))
    elif not template.is_chat:
        yield _encode_plain(example.messages, template)
    else:
        yield from _encode_chat(example.messages, template)


def _encode_plain(messages: Sequence[Message], template: PromptTemplate) -> Encoded:
    *before, answer = messages
    prompt = template.prompt(before)
    prompt_ids = template.prompt_ids(prompt)
    answer_ids = (
        [*template.continuation_ids(prompt, answer["content"]), template.stop_id] if answer["content"].strip() else []
    )
    return Encoded(input_ids=prompt_ids + answer_ids, labels=[IGNORED] * len(prompt_ids) + answer_ids)


def _encode_chat(messages: Sequence[Message], template: PromptTemplate) -> Iterator[Encoded]:
    """One row with every answer trained when the turns render the same at any length, else one row per answer."""
    turns = []  # (the prompt as generation would see it, the answer with its stop token)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            turns.append(_prompt_and_answer(messages[: index + 1], template))
    last_prompt, last_answer = turns[-1]
    whole = last_prompt + last_answer
    if all(whole.startswith(prompt + answer) for prompt, answer in turns):
        yield _encode_spans(whole, turns, template)
    else:
        for prompt, answer in turns:
            yield _encode_spans(prompt + answer, [(prompt, answer)], template)


def _prompt_and_answer(messages: Sequence[Message], template: PromptTemplate) -> tuple[str, str]:
    """The rendered prompt, and what the template writes after it for the last message, up to its stop token."""
    prompt = template.prompt(messages[:-1])
    full = template.render(messages)
    if not full.startswith(prompt):
        raise LoraError(
            "the chat template writes the prompt differently once the answer follows, so the answer's tokens cannot "
            f"be told apart. Prompt: ...{prompt[-80:]!r}; with the answer: ...{full[-80:]!r}. Correct the template"
        )
    answer = full[len(prompt) :]
    if not messages[-1]["content"].strip():
        raise LoraError("has no trained token: the answer is empty")
    if template.turn_end is not None:
        body, found, _ = answer.rpartition(template.turn_end)
        if not found:
            raise LoraError(
                f"its stop token {template.turn_end!r} is not trained: the chat template leaves it out of this answer"
            )
        answer = body + found
    return prompt, answer


def _encode_spans(whole: str, turns: Sequence[tuple[str, str]], template: PromptTemplate) -> Encoded:
    """Ids of `whole` up to the last answer's end; the labels cover the answers."""
    ids: list[int] = []
    labels: list[int] = []
    done = 0
    for prompt, answer in turns:
        between = whole[done : len(prompt)]
        new = template.continuation_ids(whole[:done], between) if done else template.prompt_ids(between)
        ids += new
        labels += [IGNORED] * len(new)
        new = template.continuation_ids(prompt, answer)
        ids += new
        labels += new
        done = len(prompt) + len(answer)
    if template.turn_end is None:
        # The template ends answers with plain text or nothing: only an appended eos can stop the model.
        ids.append(template.stop_id)
        labels.append(template.stop_id)
    return Encoded(input_ids=ids, labels=labels)


def _cut(row: Encoded, max_length: int) -> Iterator[Encoded]:
    for start in range(0, len(row["input_ids"]), max_length):
        piece = slice(start, start + max_length)
        if len(row["input_ids"][piece]) > 1:  # one token alone predicts nothing
            yield Encoded(input_ids=row["input_ids"][piece], labels=row["labels"][piece])
