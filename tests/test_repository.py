"""What surrounds the code says the same as the code: CI, hooks, metadata, the place of the tests."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lora

ROOT = Path(__file__).parents[1]
TESTS = [path for path in sorted(ROOT.glob("tests/**/*.py")) if path.name.startswith("test_")]
LINES = 400
TOO_LONG = {"test_cli.py", "test_quantized_merge.py", "test_save_load.py"}  # a name goes when its file is split


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def yaml_of(name: str) -> Any:
    return yaml.safe_load(text(name))


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text("Makefile"), re.M)
    assert found is not None, target
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def test_the_workflow_runs_the_script_that_runs_everywhere() -> None:
    (job,) = yaml_of(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert [line for line in text(".ci/run").splitlines() if line.startswith("make ")] == ["make test", "make lint"]


def test_the_workflow_runs_every_python_that_is_supported() -> None:
    (job,) = yaml_of(".github/workflows/ci.yml")["jobs"].values()
    project = text("pyproject.toml")  # tomllib came with Python 3.11
    supported = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert job["strategy"]["matrix"]["python"] == supported
    assert re.findall(r'^requires-python = ">=(.*)"$', project, re.M) == supported[:1]
    assert re.findall(r'^python_version = "([\d.]+)"', project, re.M) == supported[:1]


def test_the_hooks_run_what_make_lint_runs() -> None:
    (local,) = yaml_of(".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == recipe("lint")
    assert {(hook["language"], hook["pass_filenames"]) for hook in local["hooks"]} == {("system", False)}


def test_the_citation_is_of_this_version_and_of_the_papers_in_the_source() -> None:
    citation = yaml_of("CITATION.cff")
    assert citation["version"] == lora.__version__
    assert f'license = "{citation["license"]}"' in text("pyproject.toml")
    assert f'Repository = "{citation["repository-code"]}"' in text("pyproject.toml")
    cited = {paper["doi"].removeprefix("10.48550/arXiv.") for paper in citation["references"]}
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("src/**/*.py"))
    assert set(re.findall(r"arXiv:(\d{4}\.\d{5})", source)) <= cited


def test_what_the_bug_form_asks_people_to_run_runs() -> None:
    (versions,) = (f for f in yaml_of(".github/ISSUE_TEMPLATE/bug.yml")["body"] if f["id"] == "versions")
    python, *arguments = shlex.split(re.findall(r"^python .*$", versions["attributes"]["description"], re.M)[0])
    assert python == "python"
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=True)
    assert {line.split("==")[0] for line in done.stdout.splitlines()} >= {"lora-torch", "torch", "transformers"}


def test_tests_stand_in_the_rooms_of_the_source() -> None:
    rooms = {path.stem for path in ROOT.glob("src/lora/*")} | {"verbs", "gpu", "attack"}
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in TESTS}
    assert folders - {"."} <= rooms


def test_no_two_tests_have_one_name() -> None:
    names = [path.name for path in ROOT.glob("tests/**/*.py")]
    assert len(names) == len(set(names))  # pytest imports them by it


def test_no_test_is_too_long_to_read() -> None:
    assert {path.name for path in TESTS if len(path.read_text(encoding="utf-8").splitlines()) > LINES} == TOO_LONG


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_a_test_imports_no_test_of_another_room(path: Path) -> None:
    modules = [node.module for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if hasattr(node, "module")]
    for name in modules:
        if name is not None and name.startswith("test_"):
            assert (path.parent / f"{name}.py").is_file(), f"put what it takes from {name} into a module of tests/"
