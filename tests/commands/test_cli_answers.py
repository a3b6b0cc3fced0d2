"""`lora generate` and `lora chat`: from arguments, files and pipes, whole and as they grow."""

import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

import lora
from command_line import Lora, runner
from conftest import randomize
from lora.train.conversation import Conversation
from tiny_base import save_tiny_base


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lora:
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of that base with values large enough to change its answers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    out = tmp_path_factory.mktemp("adapter")
    lora.save(randomize(lora.inject(model, r=4, targets="all-linear"), std=0.5), out)
    return out


def short(*more: object) -> list[object]:
    return [*more, "--max-new-tokens", 8]


def test_several_prompts_are_answered_as_each_alone(cli: Lora, base: Path, adapter: Path) -> None:
    ask = short("generate", base, "--adapter", adapter)
    alone = [cli(*ask, "--prompt", text)[1].removesuffix("\n") for text in ("Say hi.", "Count to five, please.")]
    assert len(set(alone)) == 2
    code, out, err = cli(*ask, "--prompt", "Say hi.", "--prompt", "Count to five, please.")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["generated"] for row in rows] == alone
    assert [row["prompt"] for row in rows] == ["Say hi.", "Count to five, please."]
    piped = cli(*ask, "--prompt", "-", stdin="\ufeffSay hi.\r\nCount to five, please.\n".encode())
    assert piped == (0, out, "")


def test_answers_are_the_same_as_they_grow(cli: Lora, base: Path, adapter: Path) -> None:
    ask = short("generate", base, "--adapter", adapter, "--prompt", "Say hi.", "--prompt", "Count to five, please.")
    whole = [json.loads(line)["generated"] for line in cli(*ask)[1].splitlines()]
    code, out, err = cli(*ask, "--stream")
    assert (code, out, err) == (0, f"{whole[0]}\n\n{whole[1]}\n", "")


@pytest.mark.parametrize(
    ("stdin", "code", "message"),
    [
        (b"one\n\ntwo\n", 3, "prompt: line 2 of stdin is empty; give one prompt a line"),
        (b"", 3, "prompt: stdin holds no line; give one prompt a line"),
        (b"\n", 3, "prompt: stdin holds no line"),
        (b"caf\xe9\n", 3, "prompt: stdin is not UTF-8 text"),
        (b"word " * 500, 2, "prompt 1 has .* tokens, and max_new_tokens=8 more would pass the 128"),
    ],
)
def test_prompts_that_cannot_be_answered(cli: Lora, base: Path, stdin: bytes, code: int, message: str) -> None:
    found, out, err = cli(*short("generate", base, "--prompt", "-"), stdin=stdin)
    [line] = err.splitlines()
    assert (found, out) == (code, "")
    assert re.match(f"error: {message}", line), line


@pytest.mark.parametrize("text", ["caf\udce9", "\ud83d", " "])
def test_surrogate_and_blank_prompts_are_one_error(cli: Lora, base: Path, text: str) -> None:
    code, out, err = cli(*short("generate", base, "--prompt", text))
    [line] = err.splitlines()
    assert (code, out) == (2, "")
    assert line.startswith("error: prompt 1 is " + ("empty" if text == " " else "no text: it holds '\\ud"))


def test_stream_and_output_do_not_go_together(cli: Lora, tmp_path: Path) -> None:
    code, _, err = cli("generate", "x", "--input", "a.jsonl", "--output", tmp_path / "b.jsonl", "--stream")
    assert (code, err.startswith("error: --stream shows answers on stdout")) == (2, True)


@pytest.mark.parametrize("name", ["rows.jsonl", "sub/../rows.jsonl", "link.jsonl", "hard.jsonl"])
def test_answers_never_go_over_the_rows_that_are_read(cli: Lora, tmp_path: Path, name: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Say hi."}\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.jsonl").symlink_to(rows)
    (tmp_path / "hard.jsonl").hardlink_to(rows)
    for source in (rows, tmp_path):
        code, _, err = cli("generate", "x", "--input", source, "--output", tmp_path / name)
        assert (code, "is read as input and would be lost; give another file" in err) == (2, True), err
        code, _, err = cli("eval", "x", "--data", source, "--answers", tmp_path / name)
        assert (code, "answers: " in err and "is read as data and would be lost" in err) == (2, True), err
    assert rows.read_text() == '{"prompt": "Say hi."}\n'


def test_answers_may_stand_in_an_adapters_folder_but_not_over_its_files(
    cli: Lora, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Say hi."}\n')
    ask = short("generate", base, "--adapter", adapter, "--input", tmp_path / "rows.jsonl")
    code, _, err = cli(*ask, "--output", adapter / "adapter_config.json")
    assert (code, "is read as adapter and would be lost" in err) == (2, True)
    for _ in range(2):
        assert cli(*ask, "--output", adapter / "answers.jsonl")[0] == 0
    (adapter / "answers.jsonl").unlink()


def test_a_conversation_from_a_pipe(cli: Lora, base: Path, adapter: Path, tmp_path: Path) -> None:
    """Answers on stdout, all else on stderr; what was said before is part of the next prompt."""
    saved = tmp_path / "talk.jsonl"
    lines = [
        "Say hi.", "", "And again?", f"/save {saved}", f"/save {saved}", "/reset", "Say hi.", "/nothing", "/save",
        "caf\udce9", "/help", "/system Be brief.", "Say hi.",
    ]  # fmt: skip
    talk = short("chat", base, "--adapter", adapter)
    code, out, err = cli(*talk, stdin="\n".join(lines).encode("utf-8", "surrogateescape"))
    assert code == 0
    first, second, third, fourth = out.removesuffix("\n").split("\n")
    assert first == third  # after /reset it is a new conversation
    assert len({first, second, fourth}) == 3
    row = json.loads(saved.read_text())
    assert [(turn["role"], turn["content"]) for turn in row["messages"]] == [
        ("user", "Say hi."), ("assistant", first), ("user", "And again?"), ("assistant", second),
    ]  # fmt: skip
    told = err.splitlines()
    assert told[:3] == [f"saved: {saved}", f"error: {str(saved)!r} is there already; give another name", "forgotten"]
    assert told[3:5] == [
        "error: there is no command '/nothing'; /help lists them", "error: /save needs a file: /save talk.jsonl",
    ]  # fmt: skip
    assert told[5].startswith("error: prompt 1 is no text")
    assert told[-1] == "the system turn is set"

    asked = json.dumps({"messages": row["messages"][:3]})
    (tmp_path / "rows.jsonl").write_text(asked + "\n")
    files = ["--input", tmp_path / "rows.jsonl", "--output", tmp_path / "answers.jsonl"]
    assert cli(*short("generate", base, "--adapter", adapter, *files))[0] == 0
    assert json.loads((tmp_path / "answers.jsonl").read_text())["generated"] == second


def test_a_long_conversation_leaves_out_its_oldest_turns(cli: Lora, base: Path) -> None:
    lines = "\n".join(["tell me more of it " * 6] * 3 + ["word " * 500]) + "\n"
    code, out, err = cli(*short("chat", base), stdin=lines.encode())
    assert (code, out.count("\n") >= 3) == (0, True)
    assert "the oldest 2 turns no longer fit and were left out of the prompt" in err
    assert err.splitlines()[-1].startswith("error: prompt 1 has ")


def test_a_chat_without_a_template_says_that_it_remembers_nothing(
    cli: Lora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = save_tiny_base(tmp_path / "plain", chat=False)
    capsys.readouterr()
    code, out, err = cli(*short("chat", plain), stdin=b"Say hi.\nSay hi.\n")
    assert code == 0
    assert err == "without a chat template each line stands alone: the model sees no earlier one\n"
    half = out[: len(out) // 2]
    assert out == half * 2
    code, _, err = cli(*short("chat", plain, "--system", "Be brief."))
    assert (code, err.startswith("error: system: without a chat template")) == (2, True)


def test_a_typed_conversation_goes_on_after_ctrl_c_and_ends_with_ctrl_d(
    cli: Lora, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a terminal: Ctrl-C while an answer comes takes the turn back, Ctrl-D ends the command in order."""
    typed = iter(["Say hi.", "Say hi."])
    monkeypatch.setattr(import_module("lora.commands.chat"), "_at_terminal", lambda: True)
    monkeypatch.setattr("builtins.input", lambda mark: next(typed, None) or _end())
    asked: list[int] = []
    real_ask = Conversation.ask

    def ask(self: Conversation, text: str, on_text: Callable[[str], None]) -> tuple[str, int]:
        asked.append(len(self.turns))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return real_ask(self, text, on_text)

    monkeypatch.setattr(Conversation, "ask", ask)
    code, out, err = cli(*short("chat", base))
    assert (code, asked) == (0, [0, 0])
    assert err == "/help lists what else can be typed\nstopped; neither your line nor the answer is remembered\n"
    assert out.startswith("\n") and out.endswith("\n\n")


def _end() -> str:
    raise EOFError
