"""The chat templates that TRL ships for its own tests, as the models' makers published them."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from lora.data.encode import IGNORED, encode_rows
from lora.data.template import PromptTemplate
from tiny_base import load_example_tokenizer

_TRL = find_spec("trl")
assert _TRL is not None and _TRL.origin is not None
# Its variants for training differ by {% generation %} alone.
TEMPLATES = [
    p for p in sorted((Path(_TRL.origin).parent / "chat_templates").glob("*.jinja")) if "_training" not in p.name
]
SPECIAL = re.compile(
    r"<\|\w+\|>|<\|\w+>|<\w+\|>|<\w+_of_\w+>|\[/?INST\]|<\uff5c[^\uff5c]+\uff5c>"
)  # as they look in most families
TURNS = (("user", "one?"), ("assistant", "It is 1."), ("user", "two?"), ("assistant", "It is 2."))


def test_there_are_templates() -> None:
    assert len(TEMPLATES) > 20


@pytest.fixture(scope="module")
def special() -> list[str]:
    found = {name for path in TEMPLATES for name in SPECIAL.findall(path.read_text())}
    return sorted(found | {"<end_of_utterance>"})


def test_every_answer_is_trained_once_and_no_question_in_all_of_them(special: list[str]) -> None:
    tokenizer = load_example_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, *special]})
    wrong = {}
    for path in TEMPLATES:
        tokenizer.chat_template = path.read_text()
        made = PromptTemplate(tokenizer)
        row = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
        data = encode_rows([row], made, 4000)
        trained = [[label for label in row["labels"] if label != IGNORED] for row in data.rows]
        text = tokenizer.decode([label for labels in trained for label in labels])
        facts = [text.count(f"It is {n}.") == 1 for n in (1, 2)] + [f"{n}?" not in text for n in ("one", "two")]
        facts += [labels[-1] == made.stop_id for labels in trained]
        if not all(facts):
            wrong[path.name] = (facts, text)
    assert not wrong
