"""Every kind of file and folder, packed or not, and the one error of each that cannot be read."""

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora.data.rows import Glance, glance, is_local, read_rows
from lora.data.sound import Placed, place
from lora.errors import DataError, LoraWarning
from said import said

ROWS = [{"prompt": 'a;\tb, "c"\nd', "completion": "é\u2028ü"}, {"prompt": "2", "completion": "vier"}]
FORMAT = "prompt/completion"


def jsonl() -> bytes:
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode("utf-8-sig")


def table(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode("utf-8-sig")


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


FILES = {
    "r.jsonl": jsonl, "r.ndjson": jsonl, "r.json": lambda: json.dumps(ROWS).encode(), "lines.json": jsonl,
    "r.csv": lambda: table(","), "semicolon.csv": lambda: table(";"), "tab.csv": lambda: table("\t"),
    "r.tsv": lambda: table("\t"), "r.parquet": parquet,
}  # fmt: skip


@pytest.mark.parametrize("packed", ["", ".gz", "gz without the name", "the name without gz"])
@pytest.mark.parametrize("name", FILES)
def test_tool_rows_every_file_gives_the_same_rows_packed_or_not(tmp_path: Path, name: str, packed: str) -> None:
    data = FILES[name]()
    path = tmp_path / (name + ".gz" if packed in (".gz", "the name without gz") else name)
    path.write_bytes(gzip.compress(data) if packed in (".gz", "gz without the name") else data)
    note = {
        "gz without the name": [f"{name}' is gzipped and not called .gz; it is read as it is"],
        "the name without gz": [f"{name}.gz' is called .gz and not gzipped; it is read as it is"],
    }.get(packed, [])
    with said(*note):
        rows = read_rows(path)
    assert rows == ROWS
    assert [place(row, 0) for row in rows] == ["1", "2"]
    with said(*note):
        assert glance(path) == Glance(FORMAT, 2)


def all_faults(path: Path) -> list[str]:
    """The lines of the error but for the first, without the file's name."""
    with pytest.raises(DataError) as told:
        read_rows(path)
    first, *faults = str(told.value).splitlines()
    assert first == f"data: {len(faults)} rows cannot be read; correct or remove them"
    return [fault.removeprefix("  - ").replace(f" of {str(path)!r}", "") for fault in faults]


def test_all_broken_rows_of_a_table_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n1,2\n1,2,3\n"a"b,c\n1\n1,2\n')
    uneven = "has not as many cells as the header (['prompt', 'completion']); quote cells that hold ','"
    assert [fault.partition(": ")[0] for fault in all_faults(path)] == [
        f"row 2 {uneven}", "near line 4 cannot be read as a row", f"row 4 {uneven}"
    ]  # fmt: skip
    path = tmp_path / "a.tsv"
    path.write_text('question\tanswer\na\n"b" c\td\n')
    assert [fault.split()[:3] for fault in all_faults(path)] == [["row", "1", "has"], ["near", "line", "3"]]


def bytes_as_text(*values: bytes) -> pa.Table:
    """Arrow takes any bytes for text until they are read."""
    ends = pa.py_buffer(np.cumsum([0, *map(len, values)], dtype=np.int32))
    text = pa.StringArray.from_buffers(len(values), ends, pa.py_buffer(b"".join(values)))
    return pa.table({"text": text})


def test_all_broken_rows_of_parquet_and_of_saved_sets_are_told_at_once(tmp_path: Path) -> None:
    table = bytes_as_text(b"x", b"\xff", b"y", b"\xe9t\xe9")
    pq.write_table(table, tmp_path / "a.parquet")
    faults = all_faults(tmp_path / "a.parquet")
    assert [fault.partition(" (")[0] for fault in faults] == [
        "row 2 holds bytes that are not UTF-8 text", "row 4 holds bytes that are not UTF-8 text"
    ]  # fmt: skip
    calls = datasets.Features({"messages": datasets.List(datasets.Json())})
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"messages": [[{"role": "user"}]] * 3}, features=calls).save_to_disk(folder)
    broken = pa.table({"messages": [["{"], ["{}"], ["["]]})
    with pa.ipc.new_stream(next(folder.glob("*.arrow")), broken.schema) as file:
        file.write_table(broken)
    assert all_faults(folder) == [
        "row 1 holds a Json value that is not JSON: '{'", "row 3 holds a Json value that is not JSON: '['"
    ]  # fmt: skip


def test_a_tsv_that_does_not_quote(tmp_path: Path) -> None:
    (tmp_path / "r.tsv").write_text('question\tanswer\n"good" film\tyes\na 5" disc\tno\n\n')
    assert read_rows(tmp_path / "r.tsv") == [
        {"question": '"good" film', "answer": "yes"}, {"question": 'a 5" disc', "answer": "no"}
    ]  # fmt: skip


def test_a_csv_whose_lines_end_in_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"\r\rquestion;answer\ra;b\r")
    assert read_rows(tmp_path / "r.csv") == [{"question": "a", "answer": "b"}]


def test_tool_rows_a_folder_of_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl()))
    (tmp_path / "a.csv").write_bytes(table(","))
    (tmp_path / ".hidden.jsonl").write_text("{")
    rows = read_rows(tmp_path)
    assert rows == ROWS + ROWS
    assert [place(row, 0) for row in rows] == ["1 of a.csv", "2 of a.csv", "1 of b.jsonl.gz", "2 of b.jsonl.gz"]
    assert glance(tmp_path) == Glance(FORMAT, 4)
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "test").mkdir()
    with pytest.warns(LoraWarning, match=r"are read: a\.csv, b\.jsonl\.gz; these are not: README\.md, test/"):
        assert len(read_rows(tmp_path)) == 4
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"\n'))
    with pytest.warns(LoraWarning), pytest.raises(DataError, match=r"line 1 of '.*b\.jsonl\.gz' is not JSON"):
        read_rows(tmp_path)


def test_folders_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="my_data: the folder .* holds no readable file .*, it is empty"):
        read_rows(tmp_path, "my_data")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="there is: train/"):
        glance(tmp_path)
    with pytest.raises(DataError, match="is no data set saved by `datasets`, so it has no split 'train'"):
        read_rows(f"{tmp_path}:train")


def test_tool_rows_a_saved_datasets_folder(tmp_path: Path) -> None:
    calls = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "more": {"deep": [1, "2"]}}]
    one = datasets.Dataset.from_list(ROWS)
    other = datasets.Dataset.from_dict(
        {"messages": [calls]}, features=datasets.Features({"messages": datasets.List(datasets.Json())})
    )
    one.select([1, 0]).save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=one, test=other).save_to_disk(tmp_path / "both")
    assert read_rows(tmp_path / "one") == ROWS[::-1]
    assert glance(f"{tmp_path}/both") == Glance(FORMAT, 2)
    assert read_rows(f"{tmp_path}/both:test") == [{"messages": calls}] == list(other)
    with pytest.raises(DataError, match="no split 'valid'; there is: train, test"):
        read_rows(f"{tmp_path}/both:valid")
    with pytest.raises(DataError, match="without splits; leave ':train' out"):
        read_rows(f"{tmp_path}/one:train")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"ruin")
    with pytest.raises(DataError, match=r"\.arrow' is not a readable Arrow file"):
        read_rows(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"state\.json' is not a note"):
        read_rows(tmp_path / "one")


DEEP = "[" * 200 + "]" * 200
BROKEN: dict[str, tuple[str, bytes, str]] = {
    "surrogate": ("a.jsonl", b'{"text": "x"}\n{"text": "h\\ud800"}', r"row 2 of .*a\.jsonl' text holds half a .*ud800"),
    "surrogate within": ("a.json", b'[{"messages": [{"role": "\\udc00"}]}]', "row 1 of .* messages holds half"),
    "surrogate in a name": ("a.jsonl", b'{"\\ud800": 1}', "row 1 of .* name holds half"),
    "deep row": ("a.jsonl", f'{{"text": "x"}}\n{{"text": {DEEP}}}'.encode(), "row 2 of .* more than 64 levels deep"),
    "deeper row": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1 of .* nested too deep"),
    "deeper file": ("a.json", b"[" * 100_000, "nested too deep"),
    "long number": ("a.jsonl", b'{"text": ' + b"7" * 5_000 + b"}", "line 1 of .* is not JSON: .*4300"),
    "nul in csv": ("a.csv", b"text\nx\0y\n", "line 2, holds a NUL byte"),
    "nul in txt": ("a.txt", b"x\0", "line 1, holds a NUL byte"),
    "nul in jsonl": ("a.jsonl", b'{"text": "x\0"}', "line 1 of .* is not JSON: Invalid control character"),
    "utf-16": ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "line 1, is not UTF-8 text"),
    "a field twice": ("a.jsonl", b'{"text": "x", "text": "y"}', "line 1 of .*the field 'text' is there twice"),
    "a column twice": ("a.csv", b"text,text\nx,y\n", "two columns named 'text'"),
    "no table": ("a.tsv", b'question\tanswer\n"a" b\n', "near line 2 of .*cannot be read as a row: "),
    "torn gzip": ("a.jsonl.gz", gzip.compress(jsonl())[:-9], "cannot be read"),
    "rotten gzip": ("a.jsonl.gz", b"\x1f\x8bxxxxxxxxxxxxxxx", "cannot be read"),
    "a suffix": ("a.docx.gz", b"x", r"ends in '\.gz'; readable are \.jsonl, \.ndjson"),
    "lists within": ("a.json", b'{"rows": [1], "n": 2}', "holds dict; .*what stands under 'rows' alone"),
    "text rows": ("a.json", b'["x"]', r"row 1 of .* is str \('x'\); every row must be an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_deep_inputs_and_a_surrogate_are_one_error_that_names_file_and_row(tmp_path: Path, case: str) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"my_data: (.|\n)*{message}") as caught:
        read_rows(tmp_path / name, "my_data")
    assert len(str(caught.value)) < 600
    str(caught.value).encode("utf-8")


def test_a_place_with_a_nul(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="NUL"):
        read_rows(f"{tmp_path}/x\0y")


def test_a_row_keeps_its_place_wherever_it_goes() -> None:
    row = Placed({"text": "x"}, 7, "b.jsonl")
    assert row == {"text": "x"} and place(row, 1) == "7 of b.jsonl"
    assert place({"text": "x"}, 3) == "3"


@pytest.mark.parametrize("source", ["org/set", "set:train[:100]", "openai/gsm8k:main:train"])
def test_a_set_on_the_hub_is_not_asked_for_by_a_glance(source: str) -> None:
    assert not is_local(source)
    assert glance(source) == Glance("known once it is loaded", None)


def test_a_config_of_a_set_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*names: str, split: str) -> Any:
        asked.append((*names, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("org/set:main:test", "org/set:main:train[:100]", "org/set:train[1:3]"):
        assert read_rows(source) == ROWS
    assert asked == [
        ("org/set", "main", "test"), ("org/set", "main", "train[:100]"), ("org/set", "train[1:3]")
    ]  # fmt: skip


LATE = [
    ("nowhere.jsonl", None, "is not there"), ("empty.jsonl", "", "holds no rows"),
    ("odd.xyz", "x", "readable are"), ("none.jsonl", '{"who": "x"}\n', "fit no known format"),
    ("typed.jsonl", '{"prompt": "q", "completion": 4}\n', "row 1: completion is int"),
    ("mixed.jsonl", '{"text": "x"}\n{"prompt": "q"}\n', "row 2: lacks text"),
]  # fmt: skip


def test_late_errors_of_data_come_without_a_heavy_import(tmp_path: Path) -> None:
    for name, content, _ in LATE:
        if content is not None:
            (tmp_path / name).write_text(content)
    (tmp_path / "good.parquet").write_bytes(parquet())
    code = f"""
import sys
from lora.data.rows import glance
from lora.errors import DataError
for name, _, message in {LATE!r}:
    try:
        glance({str(tmp_path)!r} + "/" + name, "data")
        raise SystemExit(name + " was read")
    except DataError as error:
        assert message in str(error) and str(error).startswith("data: "), error
import os
import pyarrow.parquet
threads = lambda: len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
before = threads()
assert glance({str(tmp_path)!r} + "/good.parquet") == ("prompt/completion", 2)
assert threads() == before, "pyarrow's threads may abort a process that ends at once"
heavy = {{"torch", "transformers", "datasets", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
