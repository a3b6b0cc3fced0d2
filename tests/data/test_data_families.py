"""Chat templates of well-known families: what is trained, what is lost and said, and that it is what they render."""

from typing import Any

import pytest

from chat_templates import FAMILIES, family
from lora.data.encode import IGNORED, Encoded, EncodedData, encode_rows
from lora.data.template import PromptTemplate
from lora.errors import DataError, LoraError

MADE = {name: family(name) for name in FAMILIES}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}


def spans(row: Encoded, template: PromptTemplate) -> list[str]:
    """The trained stretches of a row, as text."""
    found: list[list[int]] = [[]]
    for label in row["labels"]:
        found[-1].append(label) if label != IGNORED else found.append([])
    return [template.tokenizer.decode(ids) for ids in found if ids]


def whole(row: Encoded, template: PromptTemplate) -> str:
    return str(template.tokenizer.decode(row["input_ids"]))


def turns(*pairs: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **fields}


TWO = turns(("user", "one?"), ("assistant", "It is 1."), ("user", "two?"), ("assistant", "It is 2."))
# What is trained of TWO: the spans of each row that it becomes.
OF_TWO = {
    "llama": [["It is 1.<|eot_id|>", "It is 2.<|eot_id|>"]],
    "qwen": [["<think>\n\n</think>\n\nIt is 1.<|im_end|>"], ["<think>\n\n</think>\n\nIt is 2.<|im_end|>"]],
    "gemma": [["It is 1.<end_of_turn>", "It is 2.<end_of_turn>"]],
    "mistral": [[" It is 1.<|endoftext|>", " It is 2.<|endoftext|>"]],
    "gpt-oss": [
        ["<|channel|>final<|message|>It is 1.<|return|>"], ["<|channel|>final<|message|>It is 2.<|return|>"]
    ],
    "deepseek": [["It is 1.<|endoftext|>", "It is 2.<|endoftext|>"]],
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_and_its_end_is_trained_and_nothing_else(name: str) -> None:
    made = MADE[name]
    data = encode_rows([TWO], made, 200)
    assert [spans(row, made) for row in data.rows] == OF_TWO[name]
    # A row is the template's own rendering, up to the last answer's end.
    rendered = made.tokenizer.apply_chat_template(TWO["messages"], tokenize=False)
    assert rendered.rstrip("\n") == whole(data.rows[-1], made)
    # And each begins as the model sees it when it generates.
    for row, messages in zip(data.rows, (TWO["messages"][:1], TWO["messages"][:3]), strict=False):
        first = messages if len(data.rows) > 1 else TWO["messages"][:1]
        prompt = made.prompt_ids(made.prompt(first))
        if name != "deepseek":
            assert row["input_ids"][: len(prompt)] == prompt and IGNORED not in row["labels"][len(prompt) :][:2]


def test_a_generation_that_opens_with_more_than_the_answers_is_said() -> None:
    data = encode_rows([TWO], MADE["deepseek"], 200)
    assert "1 of 1 rows: the chat template opens an answer for a generation with more" in str(data)
    assert "opens an answer" not in str(encode_rows([TWO], MADE["llama"], 200))


@pytest.mark.parametrize(("name", "lost"), [("mistral", True), ("llama", False), ("qwen", False), ("gemma", False)])
def test_lost_system_turn_is_counted_and_said(name: str, lost: bool) -> None:
    rows = [
        turns(("system", "Be brief."), ("user", "q"), ("assistant", "yes")),
        turns(("user", "q"), ("assistant", "a")),
    ]
    data = encode_rows(rows, MADE[name], 100)
    assert ("Be brief." in whole(data.rows[0], MADE[name])) != lost
    said = "1 of 2 rows: the chat template leaves the system turn out, so the model does not see it"
    assert (said in str(data)) == lost
    assert data.lost["system"] == lost


@pytest.mark.parametrize("role", ["developer", "system"])
def test_tool_rows_a_developer_is_the_system(role: str) -> None:
    [row] = encode_rows([turns((role, "Be brief."), ("user", "q"), ("assistant", "yes"))], MADE["qwen"], 100).rows
    assert whole(row, MADE["qwen"]).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_row_fields_system_and_history_are_turns() -> None:
    row = {"instruction": "And now?", "output": "Done.", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    data = encode_rows([row], MADE["llama"], 200)
    [encoded] = data.rows
    assert spans(encoded, MADE["llama"]) == ["Hello<|eot_id|>", "Done.<|eot_id|>"]
    assert "system<|end_header_id|>\n\nBe brief.<|eot_id|>" in whole(encoded, MADE["llama"])
    pair = {"context": "q", "target": "a", "system": "Be brief."}
    [encoded] = encode_rows([pair], MADE["llama"], 200).rows
    assert "Be brief." in whole(encoded, MADE["llama"])


def tool_row(**fields: Any) -> dict[str, Any]:
    called: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answer = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "7 degrees"}
    question = [{"role": "user", "content": "How warm is Oslo?"}]
    return {"messages": [*question, called, answer, {"role": "assistant", "content": "It is 7."}], **fields}


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("llama", ['{"name": "weather", "parameters": {"city": "Oslo"}}<|eom_id|>', "It is 7.<|eot_id|>"]),
        (
            "qwen",
            [
                '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n'
                "</tool_call><|im_end|>",
                "<think>\n\n</think>\n\nIt is 7.<|im_end|>",
            ],
        ),
        (
            "gpt-oss",
            [
                ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
                "<|channel|>final<|message|>It is 7.<|return|>",
            ],
        ),
    ],
)
def test_tool_rows_calls_are_trained_and_end_with_the_templates_token(name: str, calls: list[str]) -> None:
    data = encode_rows([tool_row(tools=[TOOL])], MADE[name], 400)
    [row] = data.rows
    assert spans(row, MADE[name]) == calls
    assert "7 degrees" in whole(row, MADE[name])
    assert ('"description": "d"' in whole(row, MADE[name])) == (name != "gpt-oss")
    assert ("leaves the row's tools out" in str(data)) == (name == "gpt-oss")


def test_tool_rows_calls_that_a_template_leaves_out_are_no_empty_answers() -> None:
    with pytest.raises(DataError, match=r"row 1: .*leaves the answer's tool calls out"):
        encode_rows([tool_row()], MADE["mistral"], 200)
    row = tool_row()
    row["messages"][1]["content"] = "I shall look."
    data = encode_rows([row], MADE["mistral"], 200)
    assert "1 of 1 rows: the chat template leaves the answer's tool calls out; only its text is trained" in str(data)


def thinker(**fields: Any) -> EncodedData:
    messages = [
        {"role": "user", "content": "one?"}, {"role": "assistant", "content": "1", "reasoning_content": "Hm, one."},
        {"role": "user", "content": "two?"}, {"role": "assistant", "content": "2", **fields},
    ]  # fmt: skip
    return encode_rows([{"messages": messages}], MADE["qwen"], 200)


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_row_fields_reasoning_is_trained_with_its_own_answer(field: str) -> None:
    data = thinker(**{field: "Hm, two."})
    assert [spans(row, MADE["qwen"]) for row in data.rows] == [
        ["<think>\nHm, one.\n</think>\n\n1<|im_end|>"], ["<think>\nHm, two.\n</think>\n\n2<|im_end|>"]
    ]  # fmt: skip
    assert "Hm, one." not in whole(data.rows[1], MADE["qwen"])  # the family drops the thoughts of earlier turns
    assert not data.lost


def test_row_fields_reasoning_that_a_template_leaves_out_is_said() -> None:
    row = {"prompt": "q", "completion": "a", "reasoning_content": "Hm."}
    for name, lost in (("llama", True), ("gpt-oss", False)):
        data = encode_rows([row], MADE[name], 100)
        assert ("leaves the answer's reasoning out" in str(data)) == lost
        assert ("Hm." in whole(data.rows[0], MADE[name])) != lost


def test_row_fields_turns_with_weight_0_are_read_and_not_trained() -> None:
    row = turns(
        ("user", "a?"), ("assistant", "A"), ("user", "b?"), ("assistant", "B"), ("user", "c?"), ("assistant", "C")
    )
    row["messages"][1]["weight"] = 0
    row["messages"][3]["weight"] = 1
    row["messages"][5]["train"] = False
    [encoded] = encode_rows([row], MADE["llama"], 200).rows
    assert spans(encoded, MADE["llama"]) == ["B<|eot_id|>"]
    assert "A<|eot_id|>" in whole(encoded, MADE["llama"])
    assert whole(encoded, MADE["llama"]).endswith("B<|eot_id|>")  # nothing after it is trained


def test_tool_rows_prompt_and_completion_as_messages_train_the_completion_only() -> None:
    prompt = [
        {"role": r, "content": c} for r, c in (("system", "s"), ("user", "a?"), ("assistant", "A"), ("user", "b?"))
    ]
    for completion in ("B", [{"role": "assistant", "content": [{"type": "text", "text": "B"}]}]):
        [encoded] = encode_rows([{"prompt": prompt, "completion": completion}], MADE["llama"], 200).rows
        assert spans(encoded, MADE["llama"]) == ["B<|eot_id|>"]


def test_turns_that_a_template_refuses_name_its_reason() -> None:
    row = turns(("user", "a"), ("user", "b"), ("assistant", "c"))
    with pytest.raises(DataError, match="row 1: .*refuses the turns user/user: Conversation roles must alternate"):
        encode_rows([row], MADE["gemma"], 100)


def test_row_fields_reasoning_within_an_answer_that_a_template_takes_off_is_said() -> None:
    made = family("deepseek")
    made.tokenizer.chat_template = made.tokenizer.chat_template.replace(
        "{{ m.content }}", "{{ (m.content or '').split('</think>') | last }}"
    )
    row = {"prompt": "q", "completion": "<think>\nHm.\n</think>\n\n42"}
    data = encode_rows([row], made, 100)
    assert spans(data.rows[0], made) == ["\n\n42<|endoftext|>"]
    assert data.lost["thoughts"] == 1
    assert not encode_rows([row], MADE["llama"], 100).lost


def test_tool_rows_for_templates_that_take_arguments_as_text_or_content_in_parts() -> None:
    made = family("deepseek")
    made.tokenizer.chat_template = made.tokenizer.chat_template.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '>' + c.function.arguments }}{% endfor %}",
    )
    [row] = encode_rows([tool_row()], made, 200).rows
    assert spans(row, made)[0] == '>{"city": "Oslo"}<|endoftext|>'
    tokenizer = family("deepseek").tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}",
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
    )
    made = PromptTemplate(tokenizer)
    [row] = encode_rows([TWO], made, 200).rows
    assert spans(row, made) == OF_TWO["deepseek"][0]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(LoraError, match="does not write the answers' texts"):
        PromptTemplate(tokenizer)
