"""A run that is killed at random moments, again and again, ends with the weights of the unbroken one, to the bit."""

import json
import multiprocessing
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.train import Recipe, run
from tiny_base import save_tiny_base
from tiny_run import curve, recipe_of, same

STEPS = 12


def train(fields: dict[str, Any]) -> None:
    """What a process does until it is killed."""
    torch.set_num_threads(1)
    run(Recipe.of(**fields), resume="auto")


@pytest.fixture(scope="module")
def started() -> Callable[[Recipe], BaseProcess]:
    """Starts a run in a process that is forked after the imports, so that a kill costs little."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora.train.job", "tiny_run", "transformers.models.llama.modeling_llama"])

    def start(plan: Recipe) -> BaseProcess:
        process = context.Process(target=train, args=(plan.model_dump(),))
        process.start()
        return process

    return start


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_the_unbroken_one(
    tmp_path: Path, started: Callable[[Recipe], BaseProcess], kills: int
) -> None:
    base = save_tiny_base(tmp_path / "base")

    def plan(name: str) -> Recipe:
        return recipe_of(base, tmp_path, out=str(tmp_path / name), max_steps=STEPS, save_every=1)

    process = started(plan("warm"))  # the first one waits for the imports
    process.join()
    begun = time.monotonic()
    process = started(plan("unbroken"))
    process.join()
    assert process.exitcode == 0
    whole = time.monotonic() - begun
    moments, ended, killed, most = random.Random(0), 0, 0, 0
    while killed < kills or not finished(tmp_path / f"killed-{ended}"):
        if finished(tmp_path / f"killed-{ended}"):
            ended += 1
        begun = time.monotonic()
        process = started(plan(f"killed-{ended}"))
        # Each process gets a part of the way only, so that one run is killed several times.
        process.join(moments.uniform(0.2, 0.9) * whole if killed < kills else None)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
            most = max(most, repeated(tmp_path / f"killed-{ended}"))
        else:
            assert process.exitcode == 0
            whole = min(whole, time.monotonic() - begun)  # it had other work beside it when it was measured
    assert most <= 1
    for number in range(ended + 1):
        out = tmp_path / f"killed-{number}"
        assert same(out, tmp_path / "unbroken")
        assert curve(out) == curve(tmp_path / "unbroken")
        assert not list((out / "checkpoints").glob(".*.tmp"))
    print(f"{killed} kills, {ended + 1} runs, at most {most} step repeated")


def finished(out: Path) -> bool:
    return (out / "run.json").is_file()


def repeated(out: Path) -> int:
    """How many steps that were taken are not in the newest checkpoint, all of whose files are whole."""
    steps = sorted((out / "checkpoints").glob("step-*")) if out.is_dir() else []
    kept = json.loads((steps[-1] / "manifest.json").read_text())["step"] if steps else 0
    done = curve(out)[-1][0] if (out / "metrics.jsonl").is_file() and curve(out) else 0
    return int(done - kept)
