"""The one prompt template: training and generation both render through here.

With a chat template, a conversation is what the tokenizer renders. Without one, a prompt is its own text, wrapped as
the style says, and the answer follows it directly.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from ..errors import DataError, LoraError
from .formats import Example, Message
from .specials import fenced
from .tokens import Tokens
from .turns import for_template

# auto is chat where the tokenizer has a chat template, else plain. inst is how FinLoRA wrote its prompts.
STYLES = ("auto", "chat", "plain", "inst")
# Distinct words that no template transforms or adds of itself.
_PROBE_QUESTION, _PROBE_ANSWER = "abacus", "zeppelin"


class PromptTemplate(Tokens):
    """Renders conversations with one tokenizer and knows which token ends an answer.

    Rendered text holds fences around special tokens that a row spelled (see `specials`); `prompt_ids` and
    `continuation_ids` understand them, `unfenced` takes them out.

    Args:
        tokenizer: a transformers tokenizer; it is read, never changed.
        style: one of `STYLES`; the attribute `style` holds what auto became.

    Raises:
        LoraError: an unknown style, chat without a chat template, or a tokenizer without a token that could end an
            answer.
    """

    def __init__(self, tokenizer: Any, style: str = "auto") -> None:
        if style not in STYLES:
            raise LoraError(f"template is {style!r}; allowed: {', '.join(STYLES)}")
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        if style == "chat" and not has_chat:
            raise LoraError(
                "template is 'chat', but the tokenizer has no chat template; use plain, inst or a chat model"
            )
        super().__init__(tokenizer)
        self.style = ("chat" if has_chat else "plain") if style == "auto" else style
        self.is_chat = self.style == "chat"
        self._in_parts = False
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
        try:
            rendered = self.render(probe)
        except DataError:
            rendered = ""
        if _PROBE_ANSWER not in rendered:  # templates of models that see pictures may want content in parts
            self._in_parts = True
            rendered = self.render(probe)
        if _PROBE_ANSWER not in rendered:
            raise LoraError("the tokenizer's chat template does not write the answers' texts; give template plain")
        tail = rendered.rpartition(_PROBE_ANSWER)[2]
        found = next((i for i in self._tokenize(tail, special=False) if i in self.special), None)
        return None if found is None else str(self.tokenizer.convert_ids_to_tokens(found))

    @property
    def stop_id(self) -> int:
        """The token that every trained answer ends with, but for a call of a tool where the template ends it apart."""
        if self.turn_end is not None:
            return int(self.tokenizer.convert_tokens_to_ids(self.turn_end))
        return int(self.tokenizer.eos_token_id)

    @property
    def text_stop_id(self) -> int:
        """The token that ends a plain text: eos, which a chat template need not use for its turns."""
        eos = self.tokenizer.eos_token_id
        return self.stop_id if eos is None else int(eos)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text after which the model is to answer. `messages` end before the answer.

        Raises:
            DataError: without a chat template, anything but one user turn.
        """
        roles = [message["role"] for message in messages]
        if not self.is_chat and (roles != ["user"] or tools):
            why = "the tokenizer has none" if self.style == "plain" else f"the template is {self.style!r}"
            raise DataError(
                f"{'tools' if tools else 'the turns ' + '/'.join(roles)} need a chat template, and {why}; "
                "use a chat model, or rows with one prompt and one completion"
            )
        return self.render(messages, tools, add_generation_prompt=True)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), add_generation_prompt: bool = False
    ) -> str:
        """The conversation as the chat template, if any, writes it. Raises `DataError` when it refuses the turns."""
        if not self.is_chat:
            return "".join(self._wrapped(message) for message in messages)
        import jinja2

        try:
            try:
                return self._apply(messages, tools, add_generation_prompt)
            except TypeError:
                if not any("tool_calls" in message for message in messages):
                    raise
                # DeepSeek's templates take the arguments of a call as text, as APIs write them.
                return self._apply(messages, tools, add_generation_prompt, arguments_as_text=True)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            roles = "/".join(message["role"] for message in messages)
            raise DataError(f"the tokenizer's chat template refuses the turns {roles}: {error}") from error

    def _apply(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], open_answer: bool, **form: bool
    ) -> str:
        turns = [for_template(message, self.pattern, in_parts=self._in_parts, **form) for message in messages]
        offered = fenced(list(tools), self.pattern) or None
        apply = self.tokenizer.apply_chat_template
        return str(apply(turns, tools=offered, tokenize=False, add_generation_prompt=open_answer))

    def _wrapped(self, message: Message) -> str:
        if message["role"] == "assistant":
            return str(fenced(message["content"], self.pattern))
        if self.style == "inst":
            return f"[INST] {fenced(message['content'], self.pattern)} [/INST]"
        return str(fenced(message["content"], None))  # what a plain prompt spells is what the model reads

    def typed(self, example: Example) -> tuple[set[str], set[str]]:
        """Special tokens that the example's texts spell: those kept as text, and those that become the tokens."""
        if self.pattern is None:
            return set(), set()
        if not example.messages:
            return set(), set(self.pattern.findall(example.text))
        kept, real = set[str](), set[str]()
        for message in example.messages:
            plain = self.style == "plain" and message["role"] != "assistant"
            text = message["content"] if len(message) == 2 else json.dumps(message, ensure_ascii=False)
            (real if plain else kept).update(self.pattern.findall(text))
        return kept, real


def stop_ids(template: PromptTemplate, generation_config: Any = None) -> list[int]:
    """Every token that ends a generation: the trained stop token, and those that the model already stops at."""
    configured = getattr(generation_config, "eos_token_id", None)
    known: Iterable[int] = [configured] if isinstance(configured, int) else configured or []
    return sorted({template.stop_id, template.text_stop_id, *known})
