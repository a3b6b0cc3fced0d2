"""Text into token ids: a prompt alone, and an answer as it follows its prompt."""

from functools import cached_property
from typing import Any

from ..errors import DataError, LoraError
from .specials import fenced, parts, special_ids, special_pattern

_PROBE = "zeppelin"


class Tokens:
    """Tokenizes texts with one tokenizer, which is read and never changed.

    `is_chat` says that a chat template writes the prompts, and with them what begins a text (bos). `special` are the
    ids of special tokens, and `pattern` finds them where a text spells them.
    """

    is_chat = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = special_ids(tokenizer)
        self.pattern = special_pattern(tokenizer)
        self._last: tuple[str | None, list[int]] = (None, [])

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a rendered prompt. A chat template writes its own bos; without one the tokenizer adds it."""
        if self._last[0] != text:  # asked for once as a prompt and once more as the beginning of its answer
            self._last = text, self._tokenize(text, special=not self.is_chat)
        return list(self._last[1])

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a plain text, outside any chat template, open at its end."""
        return self._tokenize(str(fenced(text, None)), special=True)

    def continuation_ids(self, before: str, text: str) -> list[int]:
        """Token ids of `text` as it follows a prompt `before`.

        A prompt is tokenized alone when the model generates, so an answer must continue the prompt's own tokens:
        where joint tokenization would merge across the boundary, the two sides are tokenized apart.
        """
        head, joint = self.prompt_ids(before), self._tokenize(before + text, special=not self.is_chat)
        if joint[: len(head)] == head:
            return joint[len(head) :]
        return self._tokenize(text, special=False)

    def _tokenize(self, text: str, special: bool) -> list[int]:
        ids = list(self._opening) if special else []
        for piece, spelled in parts(text):
            ids += self._spelled(piece) if spelled else self._ids(piece)
        return ids

    @cached_property
    def _opening(self) -> list[int]:
        """What the tokenizer puts before a text. What it may put after one is left off: a prompt is open."""
        whole, bare = list(self.tokenizer(_PROBE, verbose=False)["input_ids"]), self._ids(_PROBE)
        starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        if not starts:
            raise LoraError("the tokenizer writes a text differently when it adds its special tokens; give another one")
        return whole[: starts[0]]

    def _ids(self, text: str, **options: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])

    def _spelled(self, text: str) -> list[int]:
        ids = self._ids(text, split_special_tokens=True)
        if self.special.intersection(ids):
            raise DataError(
                f"it spells the special token {text!r}, which this tokenizer cannot write as text; reword it"
            )
        return ids
