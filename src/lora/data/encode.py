"""Rows into token ids and labels: the loss falls on the answers, stop token included, and on nothing else."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from ..errors import DataError
from .examples import Examples, check_share, described, read_examples
from .formats import Example
from .sound import Placed, Row
from .spans import EMPTY, LOSSES, Answer, answers
from .template import PromptTemplate

IGNORED = -100  # what torch's cross-entropy and transformers skip
# The share of rows that may be longer than max_length. They are left out whole, because a cut answer would teach the
# model not to stop. A tail of long rows is common, but what misses a tenth of its rows is not the data that was given.
LONG_SHARE = 0.1


class Encoded(TypedDict):
    """Token ids (length,) and labels (length,): the id where it is trained, -100 where not."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class EncodedData:
    """Encoded rows, and what had to be left out or taken apart to get them.

    `format` is the rows' format by name, `dropped` counts rows longer than `max_length`, `cut` plain texts that
    were cut into pieces, `split` conversations that became one row per answer. `faults` names the rows that cannot be
    trained on, by what is wrong with them; `marked` counts those marked not to be trained. `lost` counts rows of which
    the chat template left something out, `kept` and `real` those that spell a special token, which stayed text or
    became the token, and `unused` those with a field that training does not use.
    """

    rows: list[Encoded]
    format: str
    max_length: int
    read: int
    dropped: int = 0
    longest: int = 0
    cut: int = 0
    split: int = 0
    style: str = "auto"
    files: tuple[str, ...] = ()
    faults: dict[str, list[str]] = field(default_factory=dict)
    marked: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    real: Counter[str] = field(default_factory=Counter)
    unused: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def trained(self) -> int:
        return sum(label != IGNORED for row in self.rows for label in row["labels"])

    def __str__(self) -> str:
        source = f" of {len(self.files)} files ({_some(self.files)})" if self.files else ""
        head = (
            f"{len(self.rows):,} rows{source} ({self.format}), {self.tokens:,} tokens, {self.trained:,} of them trained"
        )
        return "\n".join([head, *self._left_out(), *self._changed()])

    def _left_out(self) -> Iterator[str]:
        if self.faults:
            count = sum(map(len, self.faults.values()))
            yield f"{count:,} of {self.read:,} rows cannot be trained on and were left out:\n{described(self.faults)}"
        if self.marked:
            yield f"{self.marked:,} of {self.read:,} rows are marked not to be trained and were left out"
        if self.dropped:
            yield (
                f"{self.dropped:,} of {self.read:,} rows are longer than max_length={self.max_length} and were "
                f"left out; the longest has {self.longest:,} tokens"
            )

    def _changed(self) -> Iterator[str]:
        if self.cut:
            yield f"{self.cut:,} texts are longer than max_length={self.max_length} and were cut into pieces"
        if self.split:
            yield (
                f"{self.split:,} conversations became one row per answer: this chat template writes an earlier "
                "answer differently once more turns follow"
            )
        for what, count in self.lost.items():
            yield f"{count:,} of {self.read:,} rows: {LOSSES[what]}"
        if self.kept:
            yield f"special tokens that rows spell were kept as text: {_counted(self.kept)}"
        if self.real:
            yield f"special tokens that rows spell are read as those tokens: {_counted(self.real)}"
        if self.unused:
            yield f"fields that training does not use: {_some(list(self.unused))}"


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _counted(counts: Counter[str]) -> str:
    return _some([f"{name} ({count:,} rows)" for name, count in counts.most_common()])


def encode_rows(
    rows: Sequence[Row], template: PromptTemplate, max_length: int, argument: str = "data", of: int | None = None
) -> EncodedData:
    """Encodes rows of one format, the first row's.

    Rows longer than `max_length` are left out whole, because a cut answer would teach the model not to stop; plain
    texts are cut into pieces instead. Rows that cannot be trained on are left out up to a small share. All is counted
    in the result. `of` counts the rows of the whole where these are a part of it, such as those held out: shares are of
    the whole, so that the chance of one bad row in a small part ends no run.

    Raises:
        DataError: more than `examples.SHARE` of the rows are of another format, cannot be rendered, have no trained
            token, a stop token that is not trained, or a prompt that leaves no room for an answer (the message names
            the rows); more than `LONG_SHARE` of them are too long; or none is left.
    """
    found, whole = read_examples(rows, argument, of), of or len(rows)
    files = tuple(dict.fromkeys(row.file for row in rows if isinstance(row, Placed) and row.file))
    data = EncodedData(
        [], found.format, max_length, found.read, style=template.style, files=files, faults=found.faults,
        marked=found.marked, unused=found.unused,
    )  # fmt: skip
    _encode(found, template, data)
    if not data.rows and data.longest:
        raise DataError(
            f"{argument}: every row is longer than max_length={max_length} (the longest has {data.longest} tokens); "
            "raise max_length or shorten the rows"
        )
    check_share(data.faults, whole, argument)
    if data.dropped > LONG_SHARE * whole:
        raise DataError(
            f"{argument}: {data.dropped:,} of {whole:,} rows are longer than max_length={max_length} (the longest "
            f"has {data.longest:,} tokens), more than the {LONG_SHARE:.0%} that are left out with a note; raise "
            "max_length, or shorten those rows or take them out"
        )
    if not data.rows:  # a part of a whole whose few bad rows are all in it
        raise DataError(f"{argument}: none of the {data.read:,} row(s) can be trained on\n{described(data.faults)}")
    return data


def _encode(found: Examples, template: PromptTemplate, data: EncodedData) -> None:
    """The examples' ids into `data`, with everything counted."""
    for place, example in found.examples:
        try:
            pieces, lost = _encode_example(example, template)
            if _prompt_length(pieces[0]) >= data.max_length:
                data.longest = max(data.longest, *(len(piece["input_ids"]) for piece in pieces))
                raise DataError(f"its prompt alone fills max_length={data.max_length}, so the answer would be lost")
        except DataError as error:
            data.faults.setdefault(str(error), []).append(place)
            continue
        data.lost.update(lost)
        kept, real = template.typed(example)
        data.kept.update(kept)
        data.real.update(real)
        lengths = [len(piece["input_ids"]) for piece in pieces]
        if not example.messages:
            data.cut += lengths[0] > data.max_length
            data.rows += _cut(pieces[0]["input_ids"], data.max_length)
            continue
        data.split += len(pieces) > 1
        data.longest = max(data.longest, *lengths)
        data.dropped += max(lengths) > data.max_length
        data.rows += [piece for piece, n in zip(pieces, lengths, strict=True) if n <= data.max_length]


def _encode_example(example: Example, template: PromptTemplate) -> tuple[list[Encoded], set[str]]:
    """Ids and labels of one row, several when its turns cannot share one, and what the template left out of it."""
    if not example.messages:
        ids = [*template.text_ids(example.text), template.text_stop_id]
        pieces, lost, stop_id = [Encoded(input_ids=ids, labels=list(ids))], set[str](), template.text_stop_id
        check_trained(pieces[0], stop_id)
        return pieces, lost
    found, lost = answers(example, template)
    whole = found[-1].prompt + found[-1].text
    # Of answers that nothing ends, only the last of a row gets its eos.
    together = len(found) == 1 or all(a.stop is not None and whole.startswith(a.prompt + a.text) for a in found)
    pieces = [_encode_spans(turns, template) for turns in ([found] if together else [[answer] for answer in found])]
    for piece, answer in zip(pieces, [found[-1]] if together else found, strict=True):
        check_trained(piece, _stop_id(answer, template))
    return pieces, lost


def _stop_id(answer: Answer, template: PromptTemplate) -> int:
    """The token that ends an answer; eos where the template ends it with plain text or nothing, so that it stops."""
    return template.stop_id if answer.stop is None else int(template.tokenizer.convert_tokens_to_ids(answer.stop))


def check_trained(row: Encoded, stop_id: int) -> None:
    """Raises `DataError` unless something but the stop token is trained, and the stop token is trained last."""
    trained = [label for label in row["labels"][1:] if label != IGNORED]  # position 0 predicts nothing
    if not [label for label in trained if label != stop_id]:
        raise DataError(EMPTY)
    if trained[-1] != stop_id:
        raise DataError("its stop token is not trained, so the model would not learn to stop")


def _encode_spans(turns: Sequence[Answer], template: PromptTemplate) -> Encoded:
    """Ids of the last answer's whole text; the labels cover all the answers."""
    whole = turns[-1].prompt + turns[-1].text
    ids: list[int] = []
    labels: list[int] = []
    done = 0
    for answer in turns:
        between = whole[done : len(answer.prompt)]
        new = template.continuation_ids(whole[:done], between) if done else template.prompt_ids(between)
        ids += new
        labels += [IGNORED] * len(new)
        new = template.continuation_ids(answer.prompt, answer.text)
        if answer.stop is None:
            new = [*new, template.stop_id]
        ids += new
        labels += new
        done = len(answer.prompt) + len(answer.text)
    return Encoded(input_ids=ids, labels=labels)


def _prompt_length(row: Encoded) -> int:
    return next((i for i, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))


def _cut(ids: list[int], max_length: int) -> Iterator[Encoded]:
    for start in range(0, len(ids), max_length):
        piece = ids[start : start + max_length]
        if len(piece) > 1:  # one token alone predicts nothing
            yield Encoded(input_ids=piece, labels=list(piece))
