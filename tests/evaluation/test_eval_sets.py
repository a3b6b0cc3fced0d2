"""Rows into prompts, references and labels."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora.errors import DataError, LoraError
from lora.evaluation.sets import data_set, task_set
from lora.evaluation.tasks import TASKS


def test_rows_with_one_prompt_are_asked_once_and_share_their_references() -> None:
    rows = [
        {"prompt": "a", "completion": "x"}, {"prompt": "b", "completion": "y"}, {"prompt": "a", "completion": "z"},
        {"prompt": "a", "completion": "x"},
    ]  # fmt: skip
    found = data_set(rows, (), None, None)
    assert [prompt.messages[0]["content"] for prompt in found.prompts] == ["a", "b"]
    assert found.prompt_of == [0, 1, 0, 0]
    assert found.by_prompt() == [["x", "z"], ["y"]]
    assert (found.metrics, found.max_new_tokens) == (("perplexity", "bleu", "rouge_l", "exact"), 128)


def test_all_rows_that_cannot_be_scored_are_told_at_once() -> None:
    good, bad = {"prompt": "a", "completion": "x"}, {"prompt": "b"}
    with pytest.raises(DataError) as told:
        data_set([good, bad, good, bad], (), None, None)
    first, *faults = str(told.value).splitlines()
    assert first == "data: 2 rows cannot be measured; correct or remove them"
    assert [fault.split(": ")[0] for fault in faults] == ["  - row 2", "  - row 4"]


def test_a_row_may_have_several_references() -> None:
    found = data_set([{"prompt": "a", "references": ["x", "y"]}], (), None, 7)
    assert (found.by_prompt(), found.max_new_tokens) == ([["x", "y"]], 7)
    assert found.rows == [{"prompt": "a", "completion": "x"}]  # whose loss is measured


def test_a_conversation_is_asked_before_its_last_answer() -> None:
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    found = data_set([{"messages": turns}], ("exact",), None, None)
    assert [m["content"] for m in found.prompts[0].messages] == ["a", "b", "c"]
    assert found.references == [["d"]]


def test_labels_are_the_answers_of_all_rows_however_few_are_asked() -> None:
    rows = [{"prompt": str(n), "completion": "AB"[n // 8]} for n in range(10)]
    found = data_set(rows, ("accuracy", "no_label"), 2, None)
    assert (found.labels, [row["prompt"] for row in found.rows]) == (("A", "B"), ["0", "5"])
    assert found.labels_in(["b, I think", "neither"]) == ["b", ""]


def test_answers_that_hold_several_labels_are_scored_each(tmp_path: Path) -> None:
    rows = [{"context": "which?", "target": "Goodwill,Debt"}, {"context": "what?", "target": "Cash"}]
    (tmp_path / "finer_test_batched.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = task_set(TASKS["xbrl_finer"], tmp_path, None, None)
    assert found.labels == ("Goodwill", "Debt", "Cash")
    assert found.targets() == ["Goodwill", "Debt", "Cash"]
    assert found.labels_in(["Goodwill", "cash, Debt"]) == ["goodwill", "", "cash"]
    assert found.max_new_tokens == 100


def test_a_tasks_labels_are_known_whatever_its_file_has(tmp_path: Path) -> None:
    (tmp_path / "tfns_test.jsonl").write_text(json.dumps({"context": "up", "target": "positive"}) + "\n")
    assert task_set(TASKS["tfns"], tmp_path, 1, 3).labels == ("negative", "neutral", "positive")


@pytest.mark.parametrize(
    ("rows", "metrics", "message"),
    [
        ([{"prompt": "a", "completion": "x"}, {"prompt": "b"}], (), "data: row 2: lacks completion"),
        ([{"prompt": "a"}], (), "data: row 1: the fields 'prompt' fit no known format"),
        ([{"prompt": "a", "references": []}], (), "data: row 1: references must be a list of at least one text"),
        ([{"prompt": "a", "completion": "x"}], ("blue",), "metrics: there is no 'blue'; allowed: perplexity, bleu"),
        ([{"text": "a b"}], ("bleu",), "metrics: plain texts have no answers"),
    ],
)
def test_rows_that_cannot_be_scored(rows: list[dict[str, Any]], metrics: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError if "row" in message else LoraError, match=message):
        data_set(rows, metrics, None, None)


def test_plain_texts_have_a_loss_alone() -> None:
    found = data_set([{"text": "a b"}], (), None, None)
    assert (found.metrics, found.prompts) == (("perplexity",), [])
