"""The one prompt template: training and generation both render through here.

With a chat template, a conversation is what the tokenizer renders. Without one, a prompt is its own text and the
answer follows it directly.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from ..errors import DataError, LoraError
from .formats import Message

# Distinct words that no template transforms or adds of itself.
_PROBE_QUESTION, _PROBE_ANSWER = "abacus", "zeppelin"


class PromptTemplate:
    """Renders conversations with one tokenizer and knows which token ends an answer.

    Args:
        tokenizer: a transformers tokenizer; it is read, never changed.

    Raises:
        LoraError: the tokenizer has no token that could end an answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.is_chat = bool(getattr(tokenizer, "chat_template", None))
        if self.turn_end is None and tokenizer.eos_token_id is None:
            raise LoraError(
                "the tokenizer has neither an eos_token nor a chat template that ends its turns with a special token, "
                "so no answer could ever stop; set tokenizer.eos_token and save the tokenizer with the model"
            )

    @cached_property
    def turn_end(self) -> str | None:
        """The special token that the chat template puts after an answer, or None (then eos is appended)."""
        if not self.is_chat:
            return None
        probe = (Message(role="user", content=_PROBE_QUESTION), Message(role="assistant", content=_PROBE_ANSWER))
        tail = self.render(probe).rpartition(_PROBE_ANSWER)[2]
        added = self.tokenizer.added_tokens_decoder
        special = {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        found = next((i for i in self._tokenize(tail, special=False) if i in special), None)
        return None if found is None else str(self.tokenizer.convert_ids_to_tokens(found))

    @property
    def stop_id(self) -> int:
        """The token that every trained answer ends with."""
        if self.turn_end is not None:
            return int(self.tokenizer.convert_tokens_to_ids(self.turn_end))
        return int(self.tokenizer.eos_token_id)

    @property
    def text_stop_id(self) -> int:
        """The token that ends a plain text: eos, which a chat template need not use for its turns."""
        eos = self.tokenizer.eos_token_id
        return self.stop_id if eos is None else int(eos)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the model is to answer. `messages` end before the answer.

        Raises:
            DataError: without a chat template, anything but one user turn.
        """
        roles = [message["role"] for message in messages]
        if not self.is_chat and roles != ["user"]:
            raise DataError(
                f"the turns {'/'.join(roles)} need a chat template, and the tokenizer has none; "
                "use a chat model, or rows with one prompt and one completion"
            )
        return self.render(messages, add_generation_prompt=True)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the chat template, if any, writes it. Raises `DataError` when it refuses the turns."""
        if not self.is_chat:
            return "".join(message["content"] for message in messages)
        import jinja2

        try:
            turns = [dict(message) for message in messages]
            apply = self.tokenizer.apply_chat_template
            return str(apply(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
        except jinja2.TemplateError as error:
            roles = "/".join(message["role"] for message in messages)
            raise DataError(f"the tokenizer's chat template refuses the turns {roles}: {error}") from error

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a rendered prompt. A chat template writes its own bos; without one the tokenizer adds it."""
        return self._tokenize(text, special=not self.is_chat)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a plain text, outside any chat template, open at its end."""
        return self._tokenize(text, special=True)

    def continuation_ids(self, before: str, text: str) -> list[int]:
        """Token ids of `text` as it follows a prompt `before`.

        A prompt is tokenized alone when the model generates, so an answer must continue the prompt's own tokens:
        where joint tokenization would merge across the boundary, the two sides are tokenized apart.
        """
        head, joint = self.prompt_ids(before), self.prompt_ids(before + text)
        if joint[: len(head)] == head:
            return joint[len(head) :]
        return self._tokenize(text, special=False)

    def _tokenize(self, text: str, special: bool) -> list[int]:
        bare = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not special:
            return bare
        ids = list(self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
        # Some tokenizers close every text with eos; a prompt is open, and an answer gets exactly one.
        while len(ids) > len(bare) and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return ids


def stop_ids(template: PromptTemplate, generation_config: Any = None) -> list[int]:
    """Every token that ends a generation: the trained stop token, and those that the model already stops at."""
    configured = getattr(generation_config, "eos_token_id", None)
    known: Iterable[int] = [configured] if isinstance(configured, int) else configured or []
    return sorted({template.stop_id, template.text_stop_id, *known})
