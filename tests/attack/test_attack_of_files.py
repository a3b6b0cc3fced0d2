"""The short form of the attack on adapter files: mutants through load and inspect. `make attack` runs the long one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("attack_of_files.py")
KINDS = ("sealed", "sealed anew", "unsealed")

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux", reason="the attacker forks, and reads what a process needed from /proc"
    ),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the attacker found, in a process of its own: its memory limits need a process without a suite in it."""
    found = tmp_path_factory.mktemp("attack") / "figures.json"
    command = [sys.executable, SCRIPT, "--only", "mutants", "--mutants", "1200", "--quiet", "--json", found]
    done = subprocess.run(command, capture_output=True, text=True)
    assert found.is_file(), done.stderr
    return json.loads(found.read_text())


def clean(line: dict[str, Any], *faults: str) -> None:
    assert set(faults) <= line["faults"].keys()
    assert line["tried"]
    assert not any(line["faults"][fault] for fault in faults), (line["faults"], line["examples"])


@pytest.mark.parametrize("verb", ["load", "inspect"])
@pytest.mark.parametrize("kind", KINDS)
def test_foreign_exceptions_of_mutants_there_are_none(kind: str, verb: str, figures: dict[str, Any]) -> None:
    clean(figures[f"mutants {kind}, {verb}"], "foreign", "long message")


@pytest.mark.parametrize("verb", ["load", "inspect"])
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_config_and_every_other_mutant_takes_little_time_and_memory(
    kind: str, verb: str, figures: dict[str, Any]
) -> None:
    clean(figures[f"mutants {kind}, {verb}"], "hang", "memory")


@pytest.mark.parametrize("kind", KINDS)
def test_nan_adapter_and_other_values_never_load_silently(kind: str, figures: dict[str, Any]) -> None:
    clean(figures[f"mutants {kind}, load"], "not finite", "other values")


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_mutant_leaves_the_model_and_the_random_numbers(kind: str, figures: dict[str, Any]) -> None:
    clean(figures[f"mutants {kind}, load"], "touched")


def test_most_mutants_reach_what_they_are_meant_for(figures: dict[str, Any]) -> None:
    """Some load unchanged, some are refused: an attack that is always refused at the door tries nothing."""
    for kind in ("sealed", "unsealed"):
        line = figures[f"mutants {kind}, load"]
        assert line["more"]["same values"] > line["tried"] / 10
        assert line["more"]["refused"] > line["tried"] / 4
