"""`lora doctor`: on this machine, and where something is missing or broken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lora import LoraError
from lora.commands import app
from lora.train import health

NAMES = ["versions", "torch computes", "memory", "GPU", "bf16", "TF32", "Triton", "fused operator", "nf4 bases"]


def of(found: list[health.Finding], name: str) -> health.Finding:
    [each] = [each for each in found if each.name == name]
    return each


def test_a_machine_that_trains_is_usable_and_each_line_says_what_is_so() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    content = json.loads(done.output)
    found = [health.Finding(**each) for each in content["findings"]]
    assert content["usable"] and [each.name for each in found][: len(NAMES)] == NAMES
    assert all(each.said for each in found)
    assert torch.__version__.partition("+")[0] in of(found, "versions").said
    assert of(found, "torch computes").ok and of(found, "fused operator").ok == torch.cuda.is_available()
    if not torch.cuda.is_available():
        assert "plain torch" in of(found, "fused operator").said


def test_what_fails_is_told_with_its_cause_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(health, "fused_linear", broken)
    monkeypatch.setattr(health, "find_spec", lambda name: None)
    monkeypatch.setattr(health, "ROOM", 1 << 60)
    monkeypatch.setattr(health, "check_optimizer", broken)
    found = list(health.examine(str(tmp_path)))
    assert of(found, "fused operator").said == "failed with RuntimeError: no kernel image is available"
    assert "pip install 'lora-torch[fast]'" in of(found, "Liger").said
    assert "GiB free in" in of(found, "disk").said and of(found, "disk").ok is False
    assert "no config.json" in of(found, "model").said
    done = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path)])
    assert isinstance(done.exception, LoraError) and "nothing trains here: model" in str(done.exception)
    assert "not  model:" in done.output


def test_a_model_on_the_hub_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = health._tried("model", lambda: health._model("org/there-is-no-such-model"))
    assert finding.ok is False and "org/there-is-no-such-model" in finding.said
