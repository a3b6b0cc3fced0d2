"""An answer's text as it grows: its pieces, put together, are the answer as it would have come whole."""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Pieces(BaseStreamer):
    """Given to `generate` as `streamer`: calls `emit` with each new piece of one answer.

    transformers' TextStreamer decodes each line on its own, so that a piece can differ from the whole by a space, and
    writes out a stop token that is not marked special. Here all of an answer is decoded each time.

    Args:
        stops: tokens that end the answer and are no part of it.
    """

    def __init__(self, tokenizer: Any, stops: Collection[int], emit: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.emit = emit
        self.ids: list[int] = []
        self.sent = ""
        self._prompt = True  # what comes first is the prompt
        self._stopped = False

    def put(self, value: Tensor) -> None:
        new = value.flatten().tolist()
        if self._prompt or self._stopped:
            self._prompt = False
            return
        for token in new:
            self._stopped = self._stopped or token in self.stops
            if not self._stopped:
                self.ids.append(token)
        text = self.text()
        if text.endswith("\ufffd"):  # in the middle of a character
            return
        if getattr(self.tokenizer, "clean_up_tokenization_spaces", False):
            text = text[: text.rfind(" ")] if " " in text else ""  # a space may go when the next token comes
        self._send(text)

    def end(self) -> None:
        self._send(self.text())

    def text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _send(self, text: str) -> None:
        if len(text) > len(self.sent):
            self.emit(text[len(self.sent) :])
            self.sent = text
