"""What README.md tells people to type, typed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_quick_start_runs(folder: Path) -> None:
    printed = run([sys.executable, "-W", "ignore", "-c", blocks()[0]], folder)
    assert "trainable" in printed
    assert "update kept" in printed
    assert {f.name for f in (folder / "out/adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_tour_runs_after_the_quick_start(folder: Path) -> None:
    run([sys.executable, "-W", "ignore", "-c", blocks()[0] + "lora.remove(model)\n" + blocks()[1]], folder)


def test_the_commands_run(folder: Path) -> None:
    commands = [shlex.split(line) for line in re.findall(r"^    (lora .*)$", README, re.M)]
    assert [c[1] for c in commands] == ["train", "generate", "inspect", "merge"]
    short = {
        "train": ["--max-steps", "2", "--warmup-steps", "1", "--batch-size", "2"],
        "generate": ["--max-new-tokens", "4"],
    }
    for command in commands:
        run([sys.executable, "-m", "lora.cli", *command[1:], *short.get(command[1], [])], folder)
    assert (folder / "out/merged/model.safetensors").is_file()


def test_every_file_that_the_documents_name_exists() -> None:
    for document in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
