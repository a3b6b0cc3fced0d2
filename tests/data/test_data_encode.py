"""The mask: what is trained is the answers with their stop tokens, and nothing else, whatever the template."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from lora import LoraError
from lora.data.encode import IGNORED, Encoded, check_trained, encode_rows
from lora.data.template import PromptTemplate, stop_ids
from lora.errors import DataError
from tiny_base import load_example_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3 does: an empty thought stands before the last answer only.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# The prompt changes once the answer is there, so the answer's tokens cannot be told.
SHIFTY = (
    "{% if add_generation_prompt %}Q{% else %}Z{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}<|endoftext|>"
)
# The stop token is there for short answers only.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.content|length < 10 %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PICKY = "{{ raise_exception('roles must alternate') }}"


def with_template(template: str | None) -> PromptTemplate:
    tokenizer = load_example_tokenizer()
    if template is not None and "im_end" in template:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return PromptTemplate(tokenizer)


def trained(row: Encoded, template: PromptTemplate) -> str:
    return str(template.tokenizer.decode([label for label in row["labels"] if label != IGNORED]))


def text(row: Encoded, template: PromptTemplate) -> str:
    return str(template.tokenizer.decode(row["input_ids"]))


def dialogue(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


PAIR = {"prompt": "Say hi.", "completion": "Hello there, you!"}


@pytest.mark.parametrize(
    ("template", "whole", "answer"),
    [
        (None, "Say hi.Hello there, you!<|endoftext|>", "Hello there, you!<|endoftext|>"),
        (
            CHATML,
            "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\nHello there, you!<|im_end|>",
            "Hello there, you!<|im_end|>",
        ),
        (
            THINKING,
            "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\nHello there, you!<|im_end|>",
            "<think>\n\n</think>\n\nHello there, you!<|im_end|>",
        ),
        (NO_END, "user: Say hi.\nassistant: Hello there, you!\n<|endoftext|>", "Hello there, you!\n<|endoftext|>"),
    ],
)
def test_only_the_answer_and_its_stop_token_are_trained(template: str | None, whole: str, answer: str) -> None:
    made = with_template(template)
    [row] = encode_rows([PAIR], made, 128).rows
    assert text(row, made) == whole
    assert trained(row, made) == answer
    assert all(label in (IGNORED, i) for label, i in zip(row["labels"], row["input_ids"], strict=True))
    assert row["labels"][-1] == made.stop_id
    assert made.stop_id in stop_ids(made)


def test_the_example_models_own_template() -> None:
    made = PromptTemplate(load_example_tokenizer())
    [row] = encode_rows([PAIR], made, 128).rows
    assert text(row, made) == "<|user|>\nSay hi.\n<|assistant|>\nHello there, you!<|endoftext|>"
    assert trained(row, made) == "Hello there, you!<|endoftext|>"


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda s: s.strip() and "<|" not in s and "|>" not in s
)
TEMPLATES = {name: with_template(t) for name, t in {"plain": None, "chatml": CHATML}.items()}


@settings(max_examples=150, deadline=None)
@given(prompt=ANY_TEXT, completion=ANY_TEXT, name=st.sampled_from(sorted(TEMPLATES)))
def test_any_text_trains_itself_after_the_prompt_that_generation_sees(prompt: str, completion: str, name: str) -> None:
    made = TEMPLATES[name]
    row_in = {"prompt": prompt, "completion": completion}
    [row] = encode_rows([row_in], made, 10_000).rows
    stop = "<|endoftext|>" if name == "plain" else "<|im_end|>"
    assert trained(row, made) == completion + stop
    seen = made.prompt_ids(made.prompt([{"role": "user", "content": prompt}]))
    assert row["input_ids"][: len(seen)] == seen
    assert row["labels"][: len(seen)] == [IGNORED] * len(seen)
    assert IGNORED not in row["labels"][len(seen) :]


def test_a_word_cut_by_the_boundary_keeps_the_prompts_own_tokens() -> None:
    made = with_template(None)
    tokenizer = made.tokenizer
    prompt, completion = "a rest", "aurant"
    joint = tokenizer(prompt + completion)["input_ids"]
    alone = tokenizer(prompt)["input_ids"]
    assert joint[: len(alone)] != alone, "the case does not arise with this tokenizer"
    [row] = encode_rows([{"prompt": prompt, "completion": completion}], made, 128).rows
    assert row["input_ids"][: len(alone)] == alone
    assert trained(row, made) == "aurant<|endoftext|>"


def test_bos_comes_once_and_an_eos_of_the_tokenizers_own_does_not_double() -> None:
    tokenizer = load_example_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    specials = [("<s>", tokenizer.bos_token_id), ("<|endoftext|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=specials
    )
    assert tokenizer.decode(tokenizer("x")["input_ids"]) == "<s>x<|endoftext|>"
    made = PromptTemplate(tokenizer)
    [row] = encode_rows([PAIR], made, 128).rows
    assert text(row, made) == "<s>Say hi.Hello there, you!<|endoftext|>"
    assert trained(row, made) == "Hello there, you!<|endoftext|>"
    [row] = encode_rows([{"text": "Once."}], made, 128).rows
    assert text(row, made) == "<s>Once.<|endoftext|>"
    [row] = encode_rows([{"prompt": "", "completion": "Hi."}], made, 128).rows
    assert text(row, made) == "<s>Hi.<|endoftext|>"


def test_every_answer_of_a_conversation_is_trained_in_one_row() -> None:
    made = with_template(CHATML)
    data = encode_rows([dialogue("one?", "1", "two?", "2")], made, 128)
    [row] = data.rows
    assert trained(row, made) == "1<|im_end|>2<|im_end|>"
    assert text(row, made).endswith("two?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>")
    assert data.split == 0


def test_turns_that_render_differently_later_become_one_row_per_answer_and_are_counted() -> None:
    made = with_template(THINKING)
    data = encode_rows([dialogue("one?", "1", "two?", "2"), dialogue("three?", "3")], made, 128)
    thought = "<think>\n\n</think>\n\n"
    assert [trained(row, made) for row in data.rows] == [f"{thought}{n}<|im_end|>" for n in "123"]
    assert "<|im_start|>assistant\n1<|im_end|>" in text(data.rows[1], made)
    assert data.split == 1
    assert "1 conversations became one row per answer" in str(data)


def test_a_turn_after_the_last_answer_is_left_out() -> None:
    made = with_template(CHATML)
    [row] = encode_rows([dialogue("one?", "1", "two?")], made, 128).rows
    assert text(row, made).endswith("assistant\n1<|im_end|>")


def test_text_is_trained_whole_and_cut_into_pieces_that_lose_nothing() -> None:
    made = with_template(CHATML)
    long = "To be or not to be, that is the question. " * 4
    data = encode_rows([{"text": long}, {"text": "Short."}], made, 16)
    assert [label for row in data.rows for label in row["labels"]] == [i for r in data.rows for i in r["input_ids"]]
    assert "".join(text(row, made) for row in data.rows) == f"{long}<|endoftext|>Short.<|endoftext|>"
    assert max(len(row["input_ids"]) for row in data.rows) == 16
    assert data.cut == 1
    assert "1 texts are longer than max_length=16 and were cut" in str(data)


def test_rows_that_are_too_long_are_left_out_and_counted() -> None:
    made = with_template(None)
    rows = [PAIR, {"prompt": "x", "completion": "word " * 50}, *[PAIR] * 8]
    data = encode_rows(rows, made, 20)
    assert len(data.rows) == 9
    assert "1 of 10 rows are longer than max_length=20 and were left out; the longest has" in str(data)
    with pytest.raises(DataError, match="1 of 9 rows are longer .*more than the 10% that are left out"):
        encode_rows(rows[:-1], made, 20)
    with pytest.raises(LoraError, match="every row is longer than max_length=3 .*raise max_length"):
        encode_rows([PAIR], made, 3)


@pytest.mark.parametrize(
    ("template", "rows", "message"),
    [
        (None, [PAIR, {"prompt": "q", "completion": " "}], "row 2: has no trained token: the answer is empty"),
        (
            CHATML,
            [PAIR, {"prompt": "q", "completion": ""}, PAIR, {"prompt": "q", "completion": ""}],
            "rows 2, 4: has no",
        ),
        (CHATML, [dialogue("q", "a", "q", "")], "row 1: has no trained token"),
        (SHIFTY, [PAIR], "row 1: the chat template writes the prompt differently once the answer follows"),
        (
            FORGETFUL,
            [dialogue("q", "a"), dialogue("q", "a long answer")],
            "row 2: its stop token '<.endoftext.>' is not",
        ),
        (None, [dialogue("q", "a", "q", "a")], "row 1: the turns user/assistant/user need a chat template"),
        (None, [PAIR, {"text": "t"}], "row 2: lacks prompt, completion; the first row's format is prompt/completion"),
        (None, [{"who": "x"}], "row 1: the fields 'who' fit no known format"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(template: str | None, rows: Any, message: str) -> None:
    with pytest.raises(LoraError, match=f"my_data: (.*\n)*.*{message}"):
        encode_rows(rows, with_template(template), 128, "my_data")


def test_the_templates_own_refusal_is_passed_on() -> None:
    with pytest.raises(LoraError, match="refuses the turns user/assistant: roles must alternate"):
        with_template(PICKY)


def test_a_tokenizer_without_any_stop_token_is_refused() -> None:
    tokenizer = load_example_tokenizer()
    tokenizer.chat_template = NO_END
    tokenizer.eos_token = None
    with pytest.raises(LoraError, match="neither an eos_token nor a chat template"):
        PromptTemplate(tokenizer)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([IGNORED, IGNORED, IGNORED], "no trained token"),
        ([IGNORED, IGNORED, 1], "no trained token"),
        ([5, IGNORED, 1], "no trained token"),  # position 0 predicts nothing
        ([IGNORED, 5, 6], "stop token is not trained"),
        ([IGNORED, 1, 6], "stop token is not trained"),
    ],
)
def test_the_last_check_before_training(labels: list[int], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        check_trained(Encoded(input_ids=[5, 6, 7], labels=labels), stop_id=1)
