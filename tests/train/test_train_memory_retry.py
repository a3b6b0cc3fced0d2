"""A step that runs out of memory is done again in smaller parts, to the bit of a run that had them from the start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.errors import OutOfMemoryError
from lora.train import run
from lora.train.memory_retry import MicroBatches, out_of_memory
from said import said
from tiny_base import save_tiny_base
from tiny_run import at_batches, curve, recipe_of, same

ON_THE_HOST = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: not enough memory: you tried to"
ROW = {"input_ids": [1, 2], "labels": [1, 2]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def no_room(*batches: int, error: type[Exception] = torch.OutOfMemoryError, text: str = "out") -> Callable[..., Any]:
    def does(number: int, loss: Any) -> Any:
        if number in batches:
            raise error(text)
        return loss

    return does


@pytest.mark.parametrize(
    ("error", "text"), [(torch.OutOfMemoryError, "CUDA out of memory. Tried"), (RuntimeError, ON_THE_HOST)]
)
def test_a_halved_step_is_that_of_the_smaller_run_to_the_bit(
    base: Path, tmp_path: Path, error: type[Exception], text: str
) -> None:
    """It fails in the first batch, and in the second after one whose gradient was added already."""
    plan = recipe_of(base, tmp_path, max_steps=3)
    with (
        at_batches(no_room(1, 3, error=error, text=text)),
        said(
            "step 1: out of memory; from here on 2 rows at a time", "step 1: out of memory; from here on one row at a"
        ),
    ):
        halved = run(plan).out
    small = run(recipe_of(base, tmp_path, max_steps=3, batch_size=1, grad_accum=4, out=str(tmp_path / "small"))).out
    assert same(halved, small)
    assert curve(halved) == curve(small)
    assert '"micro_batch": 1' in (halved / "run.json").read_text()


def test_a_resume_goes_on_with_the_smaller_batches(base: Path, tmp_path: Path) -> None:
    plan = recipe_of(base, tmp_path, max_steps=3, save_every=2)
    with at_batches(no_room(2)), said("step 2: out of memory; from here on 2 rows at a time"):
        whole = run(plan).out
    with said("resume: from"):
        again = run(
            plan.model_copy(update={"out": str(tmp_path / "again")}), resume=str(whole / "checkpoints" / "step-000002")
        ).out
    assert same(whole, again)


def test_one_row_that_does_not_fit_ends_the_run_with_what_to_do(base: Path, tmp_path: Path) -> None:
    plan = recipe_of(base, tmp_path, max_steps=3, batch_size=2, save_every=50)
    with (
        at_batches(no_room(*range(2, 99))),
        said("one row at a time"),
        pytest.raises(OutOfMemoryError, match=r"(?s)step 2: one row of \d+ tokens does not fit.*lora estimate.*"
                      r"gradient_checkpointing.*max_length.*after step 1 is in .*--resume auto") as e,
    ):  # fmt: skip
        run(plan)
    assert e.value.exit_code == 4


@pytest.mark.parametrize(("when", "kept"), [(1, "Nothing was saved"), (4, "after step 2 is in")])
def test_no_memory_for_the_optimizer_ends_the_run_with_what_to_do(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int, kept: str
) -> None:
    """Its step may be half done, so that nothing is saved after it: the checkpoint before stays."""
    step, count = torch.optim.AdamW.step, iter(range(1, 99))

    def instead(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(count) == when:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", instead)
    plan = recipe_of(base, tmp_path, save_every=2)
    told = f"(?s)step {when}: memory ran out .* in the optimizer .*adamw_8bit or paged_adamw.*smaller r.*{kept}"
    with pytest.raises(OutOfMemoryError, match=told) as caught:
        run(plan)
    assert caught.value.exit_code == 4
    assert not (Path(plan.out) / "adapter_config.json").exists()
    if when > 1:
        with said("resume: from"):  # on a device that has room again
            resumed = run(plan, resume="auto").out
        monkeypatch.undo()
        assert same(resumed, run(recipe_of(base, tmp_path, out=str(tmp_path / "unbroken"))).out)


def test_rows_of_like_length_share_a_micro_batch() -> None:
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 9, 4, 8, 5)]
    lengths = [[len(row["input_ids"]) for row in part] for part in MicroBatches(2).cut(rows)]
    assert lengths == [[9, 8], [5, 4], [3]]
    packs = [rows[:2], rows[2:4], rows[4:]]  # 12, 12 and 5 tokens
    assert MicroBatches(1, parts=2).cut(packs) == [[[rows[1]]], [[rows[3]]], [[rows[4]]], [[rows[2]]], [[rows[0]]]]


def test_other_errors_are_left_alone() -> None:
    assert out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    micro = MicroBatches(4)
    with pytest.raises(ValueError, match="mine"):
        micro.fit([ROW] * 4, 1, no_room_in_cut)
    assert micro.size == 4


def no_room_in_cut(cut: list[list[Any]]) -> None:
    raise ValueError("mine")


def test_a_pack_that_does_not_fit_is_taken_in_parts() -> None:
    said_of: list[str] = []
    micro = MicroBatches(2, say=said_of.append)
    seen: list[list[list[int]]] = []

    def attempt(cut: list[list[Any]]) -> str:
        seen.append([[len(item) for item in items] for items in cut])
        if len(seen) < 4:
            raise torch.OutOfMemoryError("no room")
        return "done"

    assert micro.fit([[ROW] * 4, [ROW] * 3], 5, attempt) == "done"
    assert seen == [[[4, 3]], [[4], [3]], [[2], [2], [2], [1]], [[1]] * 7]
    assert said_of[-1] == "step 5: out of memory; from here on each pack in 4 parts, with as many rows a step as before"


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ("lora.train.job.adapted", "memory ran out before the first step"),
        ("lora.train.job.LoraTrainer", "memory ran out before the first step"),
        ("lora.train.finish.conclude", "memory ran out after the last step: the adapter is whole in"),
    ],
)
def test_memory_that_runs_out_outside_of_the_steps_is_told_as_such(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, text: str
) -> None:
    def raises(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(broken, raises)
    with pytest.raises(OutOfMemoryError, match=text):
        run(recipe_of(base, tmp_path, max_steps=1))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() == ("after" in text)
