"""Every command that docs/training.md shows is one that the `lora` command takes."""

import re
import shlex

import pytest
import typer

from lora.commands import app
from tiny_base import ROOT

TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").replace("\\\n", " ")
SHOWN = re.findall(r"^lora .*$", "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S)), re.M)


@pytest.mark.parametrize("line", sorted(set(SHOWN)))
def test_a_documented_command_has_these_flags(line: str) -> None:
    words = shlex.split(line.partition(" < ")[0], comments=True)[1:]
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    while hasattr(command, "commands"):
        words.pop(0)
        command = command.commands[words[0]]
    command.make_context(words[0], words[1:], resilient_parsing=False)


def test_the_sections_are_there() -> None:
    assert len(SHOWN) > 10
