"""FinLoRA's tasks by name, and its files."""

import json
from pathlib import Path

import pytest

from lora.errors import DataError, LoraError
from lora.evaluation.scores import split_joined
from lora.evaluation.tasks import TASKS, find_tasks, read_task, spread


def names(text: str) -> list[str]:
    return [task.name for task in find_tasks(text)]


def test_tasks_are_found_by_finloras_names_and_those_of_its_paper() -> None:
    assert names("tfns, fiqa") == ["tfns", "fiqa"]
    assert names("finer,fnxl,formula_calculations") == ["xbrl_finer", "xbrl_fnxl", "xbrl_formula_calc_extract"]
    assert names("sentiment,tfns") == ["fpb", "fiqa", "tfns", "nwgi"]
    assert len(TASKS) == 15 == len({task.file for task in TASKS.values()})


@pytest.mark.parametrize(
    ("given", "message"), [("tfn", "there is no task 'tfn'; near names: .*tfns"), (",", "give one")]
)
def test_a_task_that_there_is_not(given: str, message: str) -> None:
    with pytest.raises(LoraError, match=message):
        find_tasks(given)


@pytest.mark.parametrize("under", [".", "test", "data/test"])
def test_rows_are_read_where_finlora_lays_them(tmp_path: Path, under: str) -> None:
    file = tmp_path / under / "formula_test.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"context": "2 + 2. Answer:", "target": 4}) + "\n")
    assert read_task(TASKS["formula"], tmp_path) == [{"context": "2 + 2. Answer:", "target": "4"}]


def test_what_is_wrong_with_a_tasks_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no tfns_test.jsonl, which task 'tfns' reads"):
        read_task(TASKS["tfns"], tmp_path)
    (tmp_path / "tfns_test.jsonl").write_text('{"context": "x", "target": "neutral"}\n{"context": "y"}\n')
    with pytest.raises(DataError, match="task tfns: row 2 .* lacks context or target"):
        read_task(TASKS["tfns"], tmp_path)


def test_answers_that_hold_several() -> None:
    assert split_joined("Goodwill, Debt\n,x", 2) == ["Goodwill", "Debt"]
    assert split_joined("Goodwill", 3) == ["Goodwill", "", ""]


def test_a_limit_takes_rows_from_all_over() -> None:
    rows = [{"n": n} for n in range(10)]
    assert spread(rows, None) == spread(rows, 10) == spread(rows, 99) == rows
    assert spread(rows, 3) == [{"n": 0}, {"n": 3}, {"n": 6}]
