"""A conversation with a model: its turns so far, and the next answer, prompted as in training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..data.formats import Example, Message
from ..data.template import PromptTemplate
from ..errors import LoraError
from .base import max_positions
from .generation import generate, prompt_ids


@dataclass
class Conversation:
    """What was said, and how the next answer is made.

    system: the first turn of every prompt; "" leaves it out.
    style: the template that the adapter was trained with.
    """

    model: Any
    tokenizer: Any
    style: str = "auto"
    system: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.instruct(self.system)

    @property
    def remembers(self) -> bool:
        """Whether earlier turns are part of the next prompt; without a chat template each prompt stands alone."""
        return PromptTemplate(self.tokenizer, self.style).is_chat

    def instruct(self, system: str) -> None:
        """Set the system turn. Raises `LoraError` where the template has no place for one."""
        if system and not self.remembers:
            raise LoraError("system: without a chat template a prompt has no system turn; put it into the prompt")
        self.system = system

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> tuple[str, int]:
        """The answer, and how many of the oldest turns were left out of its prompt for want of room.

        Raises:
            LoraError: a text that cannot be answered; the conversation is then as it was.
        """
        asked = Message(role="user", content=text)
        shown = [*self.turns, asked] if self.remembers else [asked]
        while len(shown) > 1 and not self._fits(shown):
            shown = shown[2:]
        [answer] = generate(
            self.model, self.tokenizer, [self._prompt(shown)], max_new_tokens=self.max_new_tokens,
            temperature=self.temperature, seed=self.seed + len(self.turns), style=self.style,
            on_text=None if on_text is None else lambda _, piece: on_text(piece),
        )  # fmt: skip
        left_out = len(self.turns) + 1 - len(shown) if self.remembers else 0
        self.turns += [asked, Message(role="assistant", content=answer)]
        return answer, left_out

    def reset(self) -> None:
        """Forget the turns; the system turn stays."""
        self.turns = []

    def row(self) -> dict[str, list[Message]]:
        """The conversation as a row that `lora train` reads. Raises `LoraError` where nothing was said."""
        if not self.turns:
            raise LoraError("there is nothing to save yet")
        return {"messages": list(self._prompt(self.turns).messages)}

    def _prompt(self, turns: list[Message]) -> Example:
        before = [Message(role="system", content=self.system)] if self.system else []
        return Example(messages=(*before, *turns))

    def _fits(self, turns: list[Message]) -> bool:
        most = max_positions(self.model.config)
        length = len(prompt_ids(1, self._prompt(turns), PromptTemplate(self.tokenizer, self.style)))
        return most is None or length + self.max_new_tokens <= most
