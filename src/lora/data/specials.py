"""Special tokens that somebody typed within a text, such as `<|endoftext|>` in a question about tokenizers.

A tokenizer reads them as the tokens themselves: a typed end token would teach the model to stop there, and a typed
role would open a turn. So texts are fenced before a template writes them down, with two code points that Unicode keeps
free for such use, and what stands between two fences is tokenized as plain text.
"""

import re
from collections.abc import Iterator
from typing import Any

from ..errors import DataError

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_FENCES = re.compile(f"[{_OPEN}{_CLOSE}]")


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all tokens that are marked special, named by the tokenizer's settings or only added."""
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}


def special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """What finds a special token in a text, the longest first; None where there is none to be found."""
    names = {str(tokenizer.convert_ids_to_tokens(i)) for i in special_ids(tokenizer)}
    names = {name for name in names if name.strip()}  # some mark a newline special, as their templates' own
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def fenced(value: Any, pattern: re.Pattern[str] | None) -> Any:
    """A text, or each text within lists and mappings, with fences around the special tokens that it spells."""
    if isinstance(value, str):
        if _FENCES.search(value):
            raise DataError("it holds U+FDD0 or U+FDD1, which are no characters and which the encoding uses itself")
        return pattern.sub(lambda found: f"{_OPEN}{found[0]}{_CLOSE}", value) if pattern is not None else value
    if isinstance(value, dict):
        return {name: fenced(part, pattern) for name, part in value.items()}
    return [fenced(part, pattern) for part in value] if isinstance(value, (list, tuple)) else value


def unfenced(text: str) -> str:
    return _FENCES.sub("", text)


def parts(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it stood between fences. The first stands outside and may be empty."""
    for number, piece in enumerate(_FENCES.split(text)):
        if piece or number == 0:
            yield piece, number % 2 == 1
