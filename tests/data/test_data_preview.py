"""`lora data preview`: what is trained is seen, on a terminal and off it, and what is left out is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora.commands import app
from lora.data import preview as preview_module
from lora.data.preview import Segment, marked, preview, printable, segments
from lora.data.template import PromptTemplate
from lora.errors import DataError, LoraError
from tiny_base import EXAMPLE, load_example_tokenizer

ROWS: list[dict[str, Any]] = [{"prompt": "Say hi.", "completion": "Hello!", "topic": "x"}] * 2 + [
    {"prompt": "Say it red:", "completion": "\x1b[31mred"}
]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return str(path)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["data", "preview", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_off_a_terminal_marks_stand_around_what_is_trained(file: str) -> None:
    said = run(file, "--model", str(EXAMPLE), "--rows", "3")
    assert "format: prompt/completion, 3 rows; template: chat" in said
    assert "what is trained stands between ⟦ and ⟧" in said
    assert "--- 1 ---\n<|user|>\nSay hi.\n<|assistant|>\n⟦Hello!<|endoftext|>⟧\n" in said
    assert "\\x1b[31mred" in said and "\x1b" not in said
    assert "fields that training does not use: topic" in said
    assert "--- 1 ---" not in run(file, "--model", str(EXAMPLE), "--rows", "0", "--template", "inst")


def test_on_a_terminal_colours_tell_what_is_trained(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    said = run(file, "--model", str(EXAMPLE))
    assert "what is trained stands in green, the rest is dim" in said
    assert "\x1b[1;32mHello!<|endoftext|>\x1b[0m" in said and "⟦" not in said
    assert "\x1b[31m" not in said


def test_as_json(file: str) -> None:
    seen = json.loads(run(file, "--model", str(EXAMPLE), "--json", "--rows", "1", "--template", "plain"))
    assert (seen["format"], seen["rows"], seen["template"]) == ("prompt/completion", 3, "plain")
    assert seen["tokens"]["least"] <= seen["tokens"]["median"] <= seen["tokens"]["most"]
    [example] = seen["examples"]
    assert example == [{"text": "Say hi.", "trained": False}, {"text": "Hello!<|endoftext|>", "trained": True}]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["nowhere.jsonl"], DataError, "data: 'nowhere.jsonl' is not there"),
        (["FILE", "--template", "x"], LoraError, "template is 'x'"),
        (["FILE", "--max-length", "3"], DataError, r"^'.*\.jsonl': every row is longer than max_length=3"),
    ],
)
def test_what_cannot_be_shown(file: str, arguments: list[str], error: type[LoraError], message: str) -> None:
    with pytest.raises(error, match=message):
        run(*[file if argument == "FILE" else argument for argument in arguments], "--model", str(EXAMPLE))


def test_many_rows_are_counted_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview_module, "COUNTED", 10)
    made = PromptTemplate(load_example_tokenizer())
    rows = [{"prompt": "q", "completion": f"answer {number}"} for number in range(25)]
    seen = preview(rows, made, 100)
    assert (seen.rows, seen.data.read) == (25, 9)
    assert "answer 3" in marked(seen.examples(2)[1])


def test_segments_join_to_the_whole_row() -> None:
    tokenizer = load_example_tokenizer()
    ids = tokenizer("one two three four five")["input_ids"]
    labels = [-100, *ids[1:3], *[-100] * (len(ids) - 3)]
    found = segments({"input_ids": ids, "labels": labels}, tokenizer)
    assert "".join(text for text, _ in found) == "one two three four five"
    assert [trained for _, trained in found] == [False, True, False]
    assert marked([Segment("a", False), Segment("b", True)]) == "a⟦b⟧"
    assert printable("a\tb\n\x07") == "a\tb\n\\x07"
