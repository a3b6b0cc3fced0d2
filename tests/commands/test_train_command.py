"""`lora train` and `lora recipes` as they are typed, and how the command ends."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora.cli import main
from lora.commands.settings import in_our_words, settings_of
from lora.errors import LoraError, Stopped
from tiny_base import EXAMPLE

Lora = Callable[..., tuple[int, str, str]]
FLAGS = {"--lr": "", "--batch-size": "", "--packing": "--no-packing", "--no-packing": "--no-packing", "--r": ""}
BASE = ["--model", str(EXAMPLE), "--data", "rows.jsonl", "--out", "out"]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Lora:
    """Runs the command in this process and in an empty folder with a few rows: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 20)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return int(exit_.value.code or 0), printed.out, printed.err

    return call


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--learning-rate 1e-4", "--set learning_rate=1e-4"),
        ("--learning_rate=1e-4 name", "--set learning_rate=1e-4 name"),
        ("--batch_size 4 --lr 1", "--batch-size 4 --lr 1"),
        ("--load_in_4bit recipe.yaml", "--set load_in_4bit=true recipe.yaml"),
        ("--bf16 True --use-dora --r 4", "--set bf16=True --set use_dora=true --r 4"),
        ("--packing True --packing=false", "--packing --no-packing"),
        ("--packing --r 4", "--packing --r 4"),
        ("--unknown 4", "--unknown 4"),
        ("-- --learning-rate 1", "-- --learning-rate 1"),
    ],
)
def test_flags_of_other_tools_are_settings(typed: str, meant: str) -> None:
    assert in_our_words(typed.split(), FLAGS) == meant.split()


def test_what_is_set_is_read_as_its_field() -> None:
    typed = ["lr=1e-4", "targets=q_proj,v_proj", "train=[a, b]", "rank-pattern=q=4", "eval_data=null", "lora_r=8"]
    assert settings_of({"r": None, "alpha": 3}, typed) == {
        "alpha": 3, "lr": "1e-4", "targets": ["q_proj", "v_proj"], "train": ["a", "b"], "rank_pattern": {"q": "4"},
        "eval_data": None, "lora_r": 8,
    }  # fmt: skip
    with pytest.raises(LoraError, match="write --set FIELD=VALUE"):
        settings_of({}, ["lr"])
    with pytest.raises(LoraError, match=r"lr: given twice, as 0.1 and '0.2'"):
        settings_of({"lr": 0.1}, ["lr=0.2"])
    assert settings_of({"lr": 0.1}, ["lr=0.1"])["lr"] == "0.1"
    with pytest.raises(LoraError, match=r"^--set targets: '\[q_proj,v_proj' is no list or mapping of YAML: .*line 1"):
        settings_of({}, ["targets=[q_proj,v_proj"])


def test_a_dry_run_of_flags_and_other_names(cli: Lora) -> None:
    typed = ["--learning_rate", "3e-4", "--set", "lora_r=4", "--lora-alpha", "8", "--exclude", "layers.0"]
    code, out, err = cli("train", *BASE, *typed, "--dry-run")
    assert code == 0, err
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines() if len(line.split()) > 1}
    assert (rows["lr"], rows["r"], rows["alpha"]) == ("0.0003", "4", "8")
    assert err.count("note: names of other tools: ") == 1
    assert all(name in err for name in ("learning_rate is lr here", "lora_r is r here", "lora_alpha is alpha here"))
    assert not Path("out").exists()


def test_exclude_flag(cli: Lora) -> None:
    """A refusal says "name it in exclude": the command takes it."""
    _, out, _ = cli("train", *BASE, "--exclude", "down_proj,layers.0", "--dry-run")
    assert [line.split()[1:3] for line in out.splitlines() if line.startswith("exclude")] == [
        ["down_proj,", "layers.0"]
    ]


def test_a_dry_run_says_all_and_ends_with_what_stops_the_run(cli: Lora) -> None:
    code, out, err = cli("train", "sentiment_llama_3_1_8b_8bits_r8", "--model", EXAMPLE, "--dry-run")
    assert code == 3
    assert "int8" in out and "q_proj, k_proj, v_proj" in out and "adapter: lora, scaling 16 / 8 = 2" in out
    assert err.startswith("error: data: '../data/train/finlora_sentiment_train.jsonl' is not there")


def test_an_entry_of_a_file_by_name(cli: Lora) -> None:
    configs = Path(__file__).parents[1] / "train" / "finlora" / "finetune_configs.json"
    typed = ["--recipes", configs, "--model", EXAMPLE, "--data", "rows.jsonl", "--set", "warmup_steps=0"]
    typed += ["--max-length", "512", "--dry-run"]
    code, out, err = cli("train", "ner_llama_3_1_8b_8bits_r8_dora", *typed)
    assert (code, err) == (0, "")
    assert "adapter: dora, scaling 16 / 8 = 2" in out and "[INST] prompt [/INST] answer" in out
    code, out, _ = cli("recipes", "--recipes", configs)
    assert code == 0 and len(out.splitlines()) == 41
    code, out, _ = cli("recipes", "ner_llama_3_1_8b_8bits_r8_dora", "--recipes", configs)
    assert "peft_use_dora: true" in out


def test_recipes_are_listed_and_printed(cli: Lora) -> None:
    code, out, _ = cli("recipes")
    assert code == 0 and "qlora" in out and "sentiment_llama_3_1_8b_8bits_r8" in out
    code, out, _ = cli("recipes", "qlora")
    assert (code, out.splitlines()[2]) == (0, "quantize: nf4")
    code, _, err = cli("recipes", "qlor")
    assert (code, err) == (2, "error: recipe: there is none called 'qlor'; near names: qlora\n")


@pytest.mark.parametrize(
    ("typed", "code"),
    [(["train", "--foo"], 2), (["nothing"], 2), (["train", "--lr", "x"], 2), (["train", "--data", "d"], 2),
     (["train", *BASE, "--data", "gone.jsonl"], 3), (["train", *BASE, "--deepspeed", "z.json"], 2)],
)  # fmt: skip
def test_exit_codes(cli: Lora, typed: list[str], code: int) -> None:
    ended, _, err = cli(*typed)
    assert ended == code and "Traceback" not in err


def test_late_errors_take_no_torch_and_under_a_second(tmp_path: Path) -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('HEAVY', sorted({'torch', 'transformers', 'datasets'} & set(sys.modules))))\n"
        f"sys.argv = ['lora', 'train', '--model', {str(EXAMPLE)!r}, '--data', 'gone.jsonl', '--out', 'o']\n"
        "from lora.cli import main; main()"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout) == (3, "HEAVY []\n")
    assert done.stderr.startswith("error: data: 'gone.jsonl' is not there")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


# Raises a signal where the command imports a package, or within a command.
EARLY = """
import importlib.abc, os, sys
class Signal(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {package!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Signal())
sys.argv = ["lora", "train", "--model", {model!r}, "--data", {data!r}, "--out", {out!r}]
from lora.cli import main; main()
"""


@pytest.mark.parametrize(
    ("name", "package"), [("SIGINT", "typer"), ("SIGTERM", "typer"), ("SIGHUP", "pydantic"), ("SIGINT", "torch")]
)
def test_second_interrupt_a_signal_in_the_first_moment_is_no_traceback(tmp_path: Path, name: str, package: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    number = int(getattr(signal, name))
    paths = {"model": str(EXAMPLE), "data": str(tmp_path / "rows.jsonl"), "out": str(tmp_path / "out")}
    code = EARLY.format(package=package, number=number, **paths)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "error: interrupted\n")


def test_a_signal_within_a_command_is_no_traceback(cli: Lora, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr("lora.train.checks.cheap", interrupted)
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)
        assert cli("train", *BASE) == (128 + number, "", "error: interrupted\n")
        assert signal.getsignal(number) is before


def test_a_run_that_was_stopped_says_what_was_kept(cli: Lora, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **given: Any) -> None:
        assert given["resume"] == "auto"
        raise Stopped(signal.SIGTERM, "stopped by SIGTERM. All is in out/checkpoints")

    monkeypatch.setattr("lora.train.job.run", stopped)
    told = "error: stopped by SIGTERM. All is in out/checkpoints\n"
    assert cli("train", *BASE, "--resume", "auto") == (143, "", told)


@pytest.mark.parametrize("given", [None, "active"])
def test_threads_wait_asleep_unless_told_otherwise(
    cli: Lora, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    cli("--version")
    assert os.environ["OMP_WAIT_POLICY"] == (given or "passive")
    monkeypatch.delenv("OMP_WAIT_POLICY")


def test_completion_is_offered(cli: Lora) -> None:
    code, out, _ = cli("--help")
    assert code == 0 and "--install-completion" in out
