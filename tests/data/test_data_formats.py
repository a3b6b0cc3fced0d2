"""Each row format into turns, and the errors that name what is wrong."""

from typing import Any

import pytest

from lora import LoraError
from lora.data.formats import Example, Message, detect, typed_prompt

ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
)
# name of the format, a row, its turns
CASES: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("prompt/completion", {"prompt": "q", "completion": "a"}, [("user", "q"), ("assistant", "a")]),
    ("context/target", {"context": "q", "target": "a"}, [("user", "q"), ("assistant", "a")]),
    ("question/answer", {"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
    ("alpaca", {"instruction": "Add.", "output": "3"}, [("user", ALPACA_NO_INPUT), ("assistant", "3")]),
    ("alpaca", {"instruction": "Add.", "input": "", "output": "3"}, [("user", ALPACA_NO_INPUT), ("assistant", "3")]),
    ("alpaca", {"instruction": "Add.", "input": None, "output": "3"}, [("user", ALPACA_NO_INPUT), ("assistant", "3")]),
    (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "all of it"},
        [("user", ALPACA_WITH_INPUT), ("assistant", "3")],
    ),
    (
        "messages",
        {"messages": [{"role": r, "content": r[0]} for r in ("system", "user", "assistant", "user", "assistant")]},
        [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "u"), ("assistant", "a")],
    ),
    (
        "sharegpt",
        {"id": 1, "conversations": [{"from": r, "value": r[0]} for r in ("system", "human", "gpt")]},
        [("system", "s"), ("user", "h"), ("assistant", "g")],
    ),
    (
        "sharegpt",
        {"conversations": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        [("user", "u"), ("assistant", "a")],
    ),
]


def turns(example: Example) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in example.messages]


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_a_row_becomes_turns(name: str, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found = detect(row)
    assert found.name == name
    assert turns(found.read(row, True)) == expected


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_its_prompt_is_the_same_without_the_answer(name: str, row: dict[str, Any], expected: Any) -> None:
    bare = {key: value for key, value in row.items() if key not in ("completion", "target", "answer", "output")}
    if "messages" in bare:
        bare["messages"] = bare["messages"][:-1]
    for asked in (row, bare):
        found = detect(asked, answers=False)
        assert found.name == name
        assert turns(found.read(asked, False)) == expected[:-1]


def test_plain_text() -> None:
    found = detect({"text": "t", "id": 3})
    assert (found.name, found.read({"text": "t"}, True)) == ("text", Example(text="t"))


def test_typed_prompts_take_the_form_of_the_training_rows() -> None:
    assert typed_prompt("q") == Example(messages=(Message(role="user", content="q"),))
    assert turns(typed_prompt("Add.", "alpaca")) == [("user", ALPACA_NO_INPUT)]
    assert typed_prompt("Once", "text") == Example(text="Once")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "answer": "a"}, "'prompt', 'answer' fit no known format; allowed: messages; conversations"),
        ({}, r"\(none\) fit no known format"),
        ({"prompt": "q", "completion": 4}, r"completion is int \(4\); it must be text"),
        ({"prompt": None, "completion": "a"}, "prompt is NoneType"),
        ({"instruction": "i", "input": 3, "output": "o"}, "input is int"),
        ({"text": " "}, "text is empty"),
        ({"messages": []}, "messages must be a list of at least one turn"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, "messages, turn 1: needs 'role' and 'content'"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "turn 1: role is 'bot'; allowed: system, user, assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn, so there is nothing to train on"),
        ({"conversations": [{"from": "bing", "value": "a"}]}, "turn 1: from is 'bing'; allowed: system, human"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "value is NoneType"),
    ],
)
def test_rows_that_cannot_be_read(row: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        detect(row).read(row, True)


def test_a_prompt_without_a_turn_is_refused() -> None:
    row = {"messages": [{"role": "assistant", "content": "a"}]}
    with pytest.raises(LoraError, match="no turn before the answer"):
        detect(row, answers=False).read(row, False)
