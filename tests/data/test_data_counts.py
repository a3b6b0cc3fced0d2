"""What is not trained is counted and said, or refused by its name; what a text spells stays text."""

import json
from pathlib import Path
from typing import Any

import pytest

from chat_templates import family
from lora import LoraError
from lora.data.encode import IGNORED, Encoded, encode_rows
from lora.data.formats import detect
from lora.data.rows import Glance, glance, read_rows
from lora.data.template import PromptTemplate
from lora.errors import DataError
from tiny_base import load_example_tokenizer

CHAT = PromptTemplate(load_example_tokenizer())
PLAIN = PromptTemplate(load_example_tokenizer(), "plain")
INST = PromptTemplate(load_example_tokenizer(), "inst")
STOP = CHAT.stop_id
PAIR = {"prompt": "Say hi.", "completion": "Hello there, you!"}


def trained(row: Encoded) -> str:
    return str(CHAT.tokenizer.decode([label for label in row["labels"] if label != IGNORED]))


def whole(row: Encoded) -> str:
    return str(CHAT.tokenizer.decode(row["input_ids"]))


# What a text spells.


@pytest.mark.parametrize("made", [CHAT, PLAIN, INST, family("llama"), family("gpt-oss")])
def test_special_in_text_stays_text_in_an_answer(made: PromptTemplate) -> None:
    token = "<|endoftext|>"
    row = {"prompt": "What ends?", "completion": f"It is {token}, and then nothing."}
    data = encode_rows([row, PAIR], made, 200)
    ids = [label for label in data.rows[0]["labels"] if label != IGNORED]
    assert ids.count(made.stop_id) == 1 and ids[-1] == made.stop_id
    assert f"It is {token}, and then nothing." in made.tokenizer.decode(ids)
    assert f"special tokens that rows spell were kept as text: {token} (1 rows)" in str(data)
    assert not set("\ufdd0\ufdd1") & set(made.tokenizer.decode(data.rows[0]["input_ids"]))


def test_special_in_text_opens_no_turn_in_a_chat() -> None:
    row = {"messages": [{"role": "user", "content": "<|assistant|>"}, {"role": "assistant", "content": "<|user|>?"}]}
    data = encode_rows([row], CHAT, 200)
    roles = [CHAT.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("user", "assistant")]
    assert [data.rows[0]["input_ids"].count(role) for role in roles] == [1, 1]
    assert data.kept == {"<|assistant|>": 1, "<|user|>": 1}
    made = family("qwen")
    call = {"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    [encoded] = encode_rows([row], made, 200).rows
    assert encoded["input_ids"].count(made.stop_id) == 2  # one a turn


def test_special_in_text_of_plain_texts_and_prompts_are_the_tokens_and_said() -> None:
    data = encode_rows([{"text": "One.<|endoftext|>Two."}], CHAT, 100)
    assert data.rows[0]["input_ids"].count(STOP) == 2
    assert "special tokens that rows spell are read as those tokens: <|endoftext|> (1 rows)" in str(data)
    data = encode_rows([{"prompt": "<|user|>\nHi\n<|assistant|>\n", "completion": "Hello"}], PLAIN, 100)
    assert data.rows[0]["input_ids"][0] == CHAT.tokenizer.convert_tokens_to_ids("<|user|>")
    assert set(data.real) == {"<|user|>", "<|assistant|>"} and not data.kept


def test_special_in_text_the_fences_are_refused_in_a_text() -> None:
    with pytest.raises(DataError, match="row 1: it holds U"):
        encode_rows([{"prompt": "q", "completion": "a\ufdd0"}], CHAT, 100)


# How a prompt is written.


def test_a_prompt_in_inst_form_as_finlora_wrote_it() -> None:
    [row] = encode_rows([{"context": "Is it good?", "target": "positive"}], INST, 100).rows
    assert whole(row) == "[INST] Is it good? [/INST]positive<|endoftext|>"
    assert trained(row) == "positive<|endoftext|>"
    prompt = INST.prompt_ids(INST.prompt([{"role": "user", "content": "Is it good?"}]))
    assert row["input_ids"][: len(prompt)] == prompt


def test_styles() -> None:
    assert [made.style for made in (CHAT, PLAIN, INST)] == ["chat", "plain", "inst"]
    tokenizer = load_example_tokenizer()
    tokenizer.chat_template = None
    assert PromptTemplate(tokenizer).style == "plain"
    with pytest.raises(LoraError, match="template is 'chat', but the tokenizer has no chat template"):
        PromptTemplate(tokenizer, "chat")
    with pytest.raises(LoraError, match="template is 'alpaca'; allowed: auto, chat, plain, inst"):
        PromptTemplate(tokenizer, "alpaca")
    with pytest.raises(DataError, match="turns system/user need a chat template, and the template is 'inst'"):
        encode_rows([{**PAIR, "system": "s"}], INST, 100)
    with pytest.raises(DataError, match="tools need a chat template"):
        encode_rows([{**PAIR, "tools": [{"name": "f"}]}], PLAIN, 100)


# Rows that are left out.


def test_rows_without_use_are_left_out_up_to_one_in_a_hundred(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [PAIR] * 298
    bad = [{"prompt": "q", "completion": " "}, {"prompt": "word " * 300, "completion": "a"}, {"prompt": "q"}]
    data = encode_rows([*rows[:40], bad[0], *rows[40:], bad[1], bad[2]], CHAT, 200)
    assert (len(data.rows), data.read) == (298, 301)
    said = str(data)
    assert "3 of 301 rows cannot be trained on and were left out:" in said
    assert "row 41: has no trained token: the answer is empty" in said
    assert "row 300: its prompt alone fills max_length=200, so the answer would be lost" in said
    assert "row 301: lacks completion; the first row's format is prompt/completion" in said
    with pytest.raises(DataError, match=r"data: 4 of 302 row\(s\) cannot be trained on, more than the 1%"):
        encode_rows([*rows, *bad, bad[0]], CHAT, 200)
    with pytest.raises(DataError, match="data: 4 of 101 row"):  # found before anything is tokenized
        glance(written(tmp_path, [*rows[:97], *[bad[2]] * 4]))


def test_a_part_that_is_held_out_is_judged_by_the_share_of_the_whole() -> None:
    bad = {"prompt": "q", "completion": " "}
    assert len(encode_rows([PAIR, bad], CHAT, 200, "eval_share", of=100).rows) == 1
    with pytest.raises(DataError, match=r"eval_share: 1 of 99 row\(s\) cannot be trained on, more than the 1%"):
        encode_rows([PAIR, bad], CHAT, 200, "eval_share", of=99)
    with pytest.raises(DataError, match=r"eval_share: none of the 1 row\(s\) can be trained on"):
        encode_rows([bad], CHAT, 200, "eval_share", of=100)


def test_a_prompt_to_answer_may_have_a_label() -> None:
    assert detect({"text": "x", "label": 1}, answers=False).read({"text": "x", "label": 1}, False).text == "x"


def test_rows_of_files_are_named_by_their_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [PAIR] * 60)))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, [PAIR] * 59 + [{**PAIR, "completion": ""}])))
    said = str(encode_rows(read_rows(tmp_path)[::-1], CHAT, 100))
    assert "119 rows of 2 files (b.jsonl, a.jsonl) (prompt/completion)" in said
    assert "row 60 of b.jsonl: has no trained token" in said


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_row_fields_rows_marked_not_to_be_trained_are_left_out_and_counted() -> None:
    marks: list[dict[str, Any]] = [{"weight": 0}, {"train": False}, {"weight": 1}, {"train": "true"}, {"weight": None}]
    data = encode_rows([{**PAIR, **mark} for mark in marks], CHAT, 100)
    assert (len(data.rows), data.marked) == (3, 2)
    assert "2 of 5 rows are marked not to be trained and were left out" in str(data)
    turn = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    with pytest.raises(DataError, match="every row is marked not to be trained"):
        encode_rows([turn], CHAT, 100)
    assert encode_rows([{"text": "x", "train": False}, {"text": "yes, indeed"}], CHAT, 100).marked == 1


def test_row_fields_without_a_use_are_named_once() -> None:
    turn = {"role": "assistant", "content": "a", "timestamp": 3, "weight": None}
    row = {"id": 1, "topic": "x", "messages": [{"role": "user", "content": "q"}, turn]}
    data = encode_rows([row, {**row, "more": 1, "none": None}], CHAT, 100)
    assert str(data).endswith("fields that training does not use: id, topic, messages.timestamp, more")
    assert "fields" not in str(encode_rows([PAIR], CHAT, 100))


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": 1}, "a text and a 'label', which are for --task classify"),
        ({**PAIR, "label": False}, "'label' is true or false.*unwanted answers would be trained"),
        ({**PAIR, "weight": 0.5}, "weight is 0.5; a turn or row is trained or not"),
        ({**PAIR, "train": "maybe"}, "train is 'maybe'"),
        ({**PAIR, "images": ["x.png"]}, "it has 'images', and only text can be trained on"),
        ({**PAIR, "history": [["a"]]}, "history, entry 1 must be"),
        ({**PAIR, "history": "a"}, "history is 'a'"),
        ({**PAIR, "system": 3}, "system is int"),
        ({**PAIR, "tools": "{oops"}, "tools must be JSON"),
        ({**PAIR, "tools": [{"type": "function"}]}, "tools: a tool needs a name"),
        ({"messages": [{"role": "system", "content": "a"}, *MESSAGES], "system": "b"}, "a field 'system' and a system"),
        ({"messages": [{**MESSAGES[0], "train": True}, MESSAGES[1]]}, "turn 1: train is true in a turn of the user"),
        ({"messages": [{**MESSAGES[0], "tool_calls": [{}]}, MESSAGES[1]]}, "turn 1: a tool call stands in a turn of"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content is NoneType"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"x": 1}]}]}, "needs a function with a"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "the arguments of a tool call must be JSON",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, MESSAGES[1]]},
            "content, part 1 is 'image_url'; only text parts",
        ),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[:1]}, "completion ends in a turn of the user"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs of preferences, which are for DPO"),
        ({"sentence": "q", "label": 1}, "a text and its label are for --task classify"),
    ],
)
def test_row_fields_that_cannot_be_honoured_are_refused_by_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"row 1.*{message}"):
        encode_rows([row], CHAT, 100)


def test_tool_rows_of_sharegpt_and_older_apis() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    conversations = [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "7"}, {"from": "gpt", "value": "a"},
    ]  # fmt: skip
    row = {"conversations": conversations, "tools": '[{"name": "f"}]', "system": "s"}
    example = detect(row).read(row, True)
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[2]["tool_calls"] == [call]
    assert example.tools == ({"type": "function", "function": {"name": "f"}},)
    older = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    result = {"role": "function", "name": "f", "content": {"degrees": 7}}
    row = {"messages": [MESSAGES[0], older, result, MESSAGES[1]]}
    example = detect(row).read(row, True)
    assert example.messages[1]["tool_calls"] == [call]
    assert example.messages[2] == {"role": "tool", "content": '{"degrees": 7}', "name": "f"}


def test_a_glance_at_labelled_rows(tmp_path: Path) -> None:
    path = written(tmp_path, [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": "0"}])
    assert glance(path, "data", "classify") == Glance("sentence/label", 2)
    with pytest.raises(DataError, match="data: row 1: its fields are"):
        glance(written(tmp_path, [PAIR]), "data", "classify")
