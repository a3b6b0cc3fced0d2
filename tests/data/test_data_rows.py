"""Reading rows from every kind of source, and the errors of broken ones."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora import LoraError
from lora.data.rows import read_rows
from lora.errors import DataError

ROWS = [{"prompt": 'a,"b"\nc', "completion": "é\u2028ü"}, {"prompt": "2", "completion": "vier"}]


def write_jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", encoding="utf-8")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # with the mark that Excel writes
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("r.jsonl", write_jsonl),
        ("r.json", write_json),
        ("lines.json", write_jsonl),
        ("r.csv", write_csv),
        ("r.parquet", write_parquet),
    ],
)
def test_every_file_format_gives_the_same_rows(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name)
    assert read_rows(tmp_path / name) == ROWS


def test_a_txt_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_rows(tmp_path / "r.txt") == [{"text": "one\n\ntwo\n"}]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_jsonl_and_csv_keep_any_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = [{"text": text} for text in texts]
    (folder / "r.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    assert read_rows(folder / "r.jsonl") == rows
    if not any({"\x00", "\r"} & set(text) for text in texts):  # what csv itself does not carry
        with (folder / "r.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text"], quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
        assert read_rows(folder / "r.csv") == rows


def test_a_hub_name_and_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("org/set") == ROWS
    assert read_rows("org/set:test[:2]") == ROWS
    assert asked == [("org/set", "train"), ("org/set", "test[:2]")]


def test_a_failing_hub_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(LoraError, match="'org/set' is no file here.*no route.*spelling"):
        read_rows("org/set")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{oops}\n', r"line 2 of .*a\.jsonl' is not JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', "row 2 of .* is list"),
        ("a.json", '{"text": "x"}', "holds dict; it must be a list"),
        ("a.json", "[1", "is not JSON"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.txt", " \n", "holds no rows"),
        ("a.csv", "prompt,completion\n1,2\n1,2,3\n", "row 2 of .* not as many cells as the header"),
        ("a.csv", "prompt,completion\n1\n", "row 1 of .* not as many cells as the header"),
        ("a.parquet", "PAR0", "not a readable parquet"),
        ("a.xlsx", "x", r"ends in '\.xlsx'; readable are \.jsonl"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(LoraError, match=message):
        read_rows(tmp_path / name)


def test_several_broken_rows_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n[1]\n{oops}\n{"text": "y"}\n')
    with pytest.raises(DataError) as told:
        read_rows(path)
    first, *faults = str(told.value).splitlines()
    assert first == "data: 2 rows cannot be read; correct or remove them"
    assert faults[0].startswith(f"  - row 2 of {str(path)!r} is list")
    assert faults[1].startswith(f"  - line 4 of {str(path)!r} is not JSON") and len(faults) == 2
    path.write_text("{oops}\n" * 1200)
    with pytest.raises(DataError, match="1,200 rows") as told:
        read_rows(path)
    assert str(told.value).splitlines()[-1] == "  - and 1,195 more" and str(told.value).count("\n") == 6


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(LoraError, match="not UTF-8"):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all"])
def test_a_missing_file_is_not_asked_of_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(LoraError, match="eval_data: .* is not there; give a file"):
        read_rows(source, "eval_data")
