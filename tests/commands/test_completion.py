"""Completion in a shell."""

from typer.testing import CliRunner

from lora.commands import app


def test_a_shell_completes_commands_and_flags() -> None:
    def completed(words: str) -> list[str]:
        place = {"_LORA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        return CliRunner().invoke(app, [], prog_name="lora", env=place).output.split()

    assert completed("lora esti") == ["estimate"]
    assert "--gradient-checkpointing" in completed("lora estimate --gradient")
