"""What docs/llama_adapter.md shows, run."""

import re
from pathlib import Path

import pytest

from tiny_base import ROOT

TEXT = (ROOT / "docs" / "llama_adapter.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(block, {})
    assert (tmp_path / "prompts" / "adapter_model.safetensors").is_file()


def test_every_verb_of_the_room_is_in_the_table() -> None:
    from lora import llama_adapter

    assert {name for name in llama_adapter.__all__ if f"`lora.llama_adapter.{name}(" not in TEXT} == set()


def test_the_architectures_that_are_tried_are_named() -> None:
    """Each model of the tests by the first word of its name there."""
    from test_prompt_architectures import MODELS

    plain = re.sub(r"[^a-z0-9]", "", TEXT.lower())
    assert [
        name for name in MODELS if re.sub(r"[^a-z0-9]", "", name.split(",")[0].split(" with")[0]) not in plain
    ] == []
