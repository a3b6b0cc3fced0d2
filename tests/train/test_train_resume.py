"""A run that goes on from a checkpoint is the unbroken run, to the bit; what does not fit is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora import LoraError
from lora.errors import CheckError
from lora.train import Recipe, run
from said import said
from tiny_base import save_tiny_base
from tiny_run import ROWS, curve, recipe_of, same


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of two passes with dropout and accumulation, held-out rows, and a checkpoint at each second step."""
    folder = tmp_path_factory.mktemp("unbroken")
    plan = recipe_of(base, folder, max_steps=None, epochs=2, batch_size=2, grad_accum=2, weight_decay=0.1,
                     eval_share=0.1, schedule="cosine", warmup_steps=2)  # fmt: skip
    run(plan)
    return plan


@pytest.fixture
def copy(unbroken: Recipe, tmp_path: Path) -> Recipe:
    """The same run as it was after its newest checkpoint but one, in a folder of its own."""
    out = tmp_path / "copy"
    shutil.copytree(Path(unbroken.out) / "checkpoints", out / "checkpoints")
    shutil.rmtree(out / "checkpoints" / "step-000006")
    return unbroken.model_copy(update={"out": str(out)})


def change(plan: Recipe, **changes: Any) -> Recipe:
    return Recipe.of(**{**plan.model_dump(), **changes})


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(unbroken: Recipe, copy: Recipe) -> None:
    with said("resume: from"):
        torch.manual_seed(77)  # whatever the process drew before
        result = run(copy, resume="auto")
    assert same(result.out, unbroken.out)
    assert curve(result.out) == curve(unbroken.out)
    assert len(curve(result.out)) == 6
    records = [json.loads((Path(plan.out) / "run.json").read_text()) for plan in (copy, unbroken)]
    assert records[0]["run"] == records[1]["run"]
    assert records[0]["metrics"]["eval_loss"] == records[1]["metrics"]["eval_loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "batch_size": 1, "max_length": 64},
        {"group_by_length": True},  # three steps are a pass: the run goes on in the second
        {"optimizer": "adamw_8bit", "r": 128},  # A of 128 x 32 is the smallest that it holds in 8 bits
    ],
    ids=["packs", "end_of_a_pass", "8_bits"],
)
def test_what_else_a_run_has_is_resumed_to_the_bit(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    plan = recipe_of(base, tmp_path, max_steps=5, save_every=4, **changes)
    whole = run(plan).out
    with said("resume: from"):
        again = run(change(plan, out=str(tmp_path / "again")), resume=str(whole / "checkpoints" / "step-000004")).out
    assert same(whole, again)
    assert curve(whole) == curve(again)


def test_a_finished_run_says_so(unbroken: Recipe) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(unbroken.out).rglob("*") if path.is_file()}
    result = run(unbroken, resume="auto")
    assert "is finished" in result.lines[0]
    assert result.metrics["steps"] == 6
    after = {path: path.stat().st_mtime_ns for path in Path(unbroken.out).rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before[path]} <= {Path(unbroken.out) / "checkpoints" / "lock"}


def test_a_finished_run_that_failed_its_check_fails_each_time(unbroken: Recipe, tmp_path: Path) -> None:
    """A script that runs the line until it succeeds would take the adapter for a good one."""
    out = tmp_path / "copy"
    shutil.copytree(unbroken.out, out)
    record = json.loads((out / "run.json").read_text())
    lines = [{"name": "stops", "verdict": "failed", "text": "0 of 8"}, {"name": "loss", "verdict": "ok", "text": "1"}]
    (out / "run.json").write_text(json.dumps({**record, "outcome": {"lines": lines, "seconds": 1.0}}))
    told = r"resume: the run in .* is finished; --force starts anew\. the adapter in .*\n  - stops: failed: 0 of 8$"
    with pytest.raises(CheckError, match=told) as caught:
        run(change(unbroken, out=str(out)), resume="auto")
    assert caught.value.exit_code == 6
    for kept in (lines[1:], [{"verdict": "failed"}], [3], "text", None):  # passed, or not as a run writes it
        (out / "run.json").write_text(json.dumps({**record, "outcome": {"lines": kept}}))
        assert "is finished" in run(change(unbroken, out=str(out)), resume="auto").lines[0]


def test_a_run_that_was_killed_after_its_last_step_is_finished(unbroken: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(Path(unbroken.out) / "checkpoints", out / "checkpoints")
    with said("resume: from"):
        result = run(change(unbroken, out=str(out)), resume="auto")
    assert same(out, unbroken.out)
    assert curve(out) == curve(unbroken.out)
    record = json.loads((Path(unbroken.out) / "run.json").read_text())
    times = {"seconds": 0, "paused_seconds": 0}
    assert {**result.metrics, **times} == {**record["metrics"], **times}


def test_the_newest_whole_one_is_taken_and_what_is_passed_over_is_said(
    unbroken: Recipe, copy: Recipe, tmp_path: Path
) -> None:
    steps = Path(copy.out) / "checkpoints"
    shutil.copytree(Path(unbroken.out) / "checkpoints" / "step-000006", steps / "step-000006")
    damaged = steps / "step-000006" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with said("passed over", "resume: from") as texts:
        run(copy, resume="auto")
    assert "optimizer.safetensors does not match its SHA-256; --resume-without optimizer goes on without" in texts[0]
    assert "step-000004" in texts[1]


@pytest.mark.parametrize(
    ("file", "why", "part"),
    [
        ("optimizer.safetensors", "optimizer.safetensors is missing", "optimizer"),
        ("random.json", "random.json is missing", "random"),
        ("adapter_model.safetensors", "adapter_model.safetensors is missing", None),
        ("manifest.json", "it has no manifest.json", None),
    ],
)
def test_a_missing_optimizer_or_another_part_is_refused(
    copy: Recipe, unbroken: Recipe, file: str, why: str, part: str | None
) -> None:
    folder = Path(copy.out) / "checkpoints" / "step-000004"
    (folder / file).unlink()
    with pytest.raises(LoraError, match=why) as e:
        run(copy, resume=str(folder))
    assert (f"--resume-without {part}" in str(e.value)) == (part is not None)
    with said("passed over"), pytest.raises(LoraError, match=r"no checkpoint in .* is whole"):
        run(copy, resume="auto")
    if part == "optimizer":
        with said("resume: from"):
            result = run(copy, resume="auto", resume_without=["optimizer"])
        assert not same(result.out, unbroken.out)
        assert [x[2] for x in curve(result.out)] == [x[2] for x in curve(unbroken.out)]  # the rates are as they were


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"lr": 0.02}, r"lr was 0.01 and is 0.02"),
        ({"batch_size": 4}, "batch_size times grad_accum was 4 and is 8"),
        ({"seed": 5, "schedule": "linear"}, "(?s)schedule was 'cosine' and is 'linear'.*seed was 0 and is 5"),
        ({"dtype": "bf16"}, "dtype was 'fp32' and is 'bf16'"),
    ],
)
def test_a_recipe_that_computes_something_else_is_refused_by_name(
    copy: Recipe, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(LoraError, match=why):
        run(change(copy, **changes), resume="auto")


def test_other_rows_are_refused_and_what_changes_nothing_is_not(copy: Recipe, unbroken: Recipe, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[1:], ROWS[0]]), encoding="utf-8")
    with pytest.raises(LoraError, match=r"data: the rows of .* are not the ones that it was trained on"):
        run(change(copy, data=str(rows)), resume="auto")
    shutil.copyfile(unbroken.data, rows)
    with said("resume: from"):
        run(change(copy, data=str(rows), log_every=1, save_every=5, max_bad_steps=9), resume="auto")
    assert same(copy.out, unbroken.out)


def test_no_checkpoint_is_a_run_from_the_start(base: Path, tmp_path: Path) -> None:
    with said("there is no checkpoint in"):
        assert run(recipe_of(base, tmp_path, max_steps=1), resume="auto").metrics["steps"] == 1
    with pytest.raises(LoraError, match="it is not there"):
        run(recipe_of(base, tmp_path, out=str(tmp_path / "new")), resume=str(tmp_path / "gone"))
    assert not (tmp_path / "new").exists()


def test_another_runs_checkpoints_are_not_deleted_by_a_resume(copy: Recipe, base: Path, tmp_path: Path) -> None:
    other = recipe_of(base, tmp_path, max_steps=1)
    run(other)
    left = Path(other.out)
    (left / "adapter_config.json").unlink()
    with pytest.raises(LoraError, match="already holds checkpoints of another run"):
        run(change(copy, out=str(left)), resume=str(Path(copy.out) / "checkpoints" / "step-000004"))
    assert (left / "checkpoints" / "step-000001").is_dir()
