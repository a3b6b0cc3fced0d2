"""Rows into token ids and labels: the loss falls on the answers, stop token included, and on nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from ..errors import DataError, LoraError
from .formats import Message, RowFormat, detect
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
    dropped: int
    longest: int
    cut: int
    split: int

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)

    def __str__(self) -> str:
        trained = sum(label != IGNORED for row in self.rows for label in row["labels"])
        lines = [f"{len(self.rows):,} rows ({self.format}), {self.tokens:,} tokens, {trained:,} of them trained"]
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
        DataError: a row of another format, one that cannot be rendered, one without a trained token or whose stop
            token is not trained (the message names the rows), or no row that fits.
    """
    encoded: list[Encoded] = []
    faults: dict[str, list[int]] = {}  # the rows, by what is wrong with them
    dropped = cut = split = longest = 0
    try:
        known = detect(rows[0])
    except LoraError as error:
        raise DataError(f"{argument}: row 1: {error}") from error
    for number, row in enumerate(rows, 1):
        try:
            pieces = _encode_row(row, known, template)
        except LoraError as error:
            faults.setdefault(str(error), []).append(number)
            continue
        lengths = [len(piece["input_ids"]) for piece in pieces]
        if known.name == "text":
            cut += lengths[0] > max_length
            encoded += _cut(pieces[0]["input_ids"], max_length)
            continue
        split += len(pieces) > 1
        longest = max(longest, *lengths)
        dropped += max(lengths) > max_length
        encoded += [piece for piece, length in zip(pieces, lengths, strict=True) if length <= max_length]
    if faults:
        raise _faulty(faults, argument)
    if not encoded:
        raise DataError(
            f"{argument}: every row is longer than max_length={max_length} (the longest has {longest} tokens); "
            "raise max_length or shorten the rows"
        )
    return EncodedData(encoded, known.name, max_length, len(rows), dropped, longest, cut, split)


def _faulty(faults: dict[str, list[int]], argument: str) -> DataError:
    lines = [f"{argument}: {sum(map(len, faults.values()))} row(s) cannot be trained on; correct or remove them"]
    for fault, numbers in list(faults.items())[:5]:
        shown = ", ".join(map(str, numbers[:20])) + (f" and {len(numbers) - 20} more" if len(numbers) > 20 else "")
        lines.append(f"  - row{'s' if len(numbers) > 1 else ''} {shown}: {fault}")
    if len(faults) > 5:
        lines.append(f"  - and {len(faults) - 5} other faults")
    return DataError("\n".join(lines))


def _encode_row(row: Row, known: RowFormat, template: PromptTemplate) -> list[Encoded]:
    """Ids and labels of one row; several when its turns cannot share a row (see `EncodedData.split`)."""
    missing = [name for name in known.fields if name not in row]
    if missing:
        raise DataError(f"lacks {', '.join(missing)}; the first row's format is {known.name}")
    example = known.read(row, True)
    if example.messages:
        pieces = _encode_turns(example.messages, template)
    else:
        ids = [*template.text_ids(example.text), template.text_stop_id]
        pieces = [Encoded(input_ids=ids, labels=list(ids))]
    for piece in pieces:
        check_trained(piece, template.stop_id if example.messages else template.text_stop_id)
    return pieces


def check_trained(row: Encoded, stop_id: int) -> None:
    """Raises `DataError` unless something but the stop token is trained, and the stop token is trained last."""
    trained = [label for label in row["labels"][1:] if label != IGNORED]  # position 0 predicts nothing
    if not [label for label in trained if label != stop_id]:
        raise DataError("has no trained token: the answer is empty")
    if trained[-1] != stop_id:
        raise DataError("its stop token is not trained, so the model would not learn to stop")


def _encode_turns(messages: Sequence[Message], template: PromptTemplate) -> list[Encoded]:
    """One row with every answer trained when the turns render the same at any length, else one row per answer."""
    ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not template.is_chat:  # the answer is the last turn, and the template refuses more than one before it
        ends = [len(messages) - 1]
    # The prompt as generation would see it, and the answer with its stop token.
    turns = [_prompt_and_answer(messages[: end + 1], template) for end in ends]
    whole = "".join(turns[-1])
    if all(whole.startswith(prompt + answer) for prompt, answer in turns):
        return [_encode_spans(whole, turns, template)]
    return [_encode_spans(prompt + answer, [(prompt, answer)], template) for prompt, answer in turns]


def _prompt_and_answer(messages: Sequence[Message], template: PromptTemplate) -> tuple[str, str]:
    """The rendered prompt, and what the template writes after it for the last message, up to its stop token."""
    prompt = template.prompt(messages[:-1])
    full = template.render(messages)
    if not full.startswith(prompt):
        raise DataError(
            "the chat template writes the prompt differently once the answer follows, so the answer's tokens cannot "
            f"be told apart. Prompt: ...{prompt[-80:]!r}; with the answer: ...{full[-80:]!r}. Correct the template"
        )
    answer = full[len(prompt) :]
    if not messages[-1]["content"].strip():
        raise DataError("has no trained token: the answer is empty")
    if template.turn_end is not None:
        body, found, _ = answer.rpartition(template.turn_end)
        if not found:
            raise DataError(
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


def _cut(ids: list[int], max_length: int) -> Iterator[Encoded]:
    for start in range(0, len(ids), max_length):
        piece = ids[start : start + max_length]
        if len(piece) > 1:  # one token alone predicts nothing
            yield Encoded(input_ids=piece, labels=list(piece))
