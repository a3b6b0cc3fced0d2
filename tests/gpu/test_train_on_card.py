"""`lora train` on a card: a resume to the bit, memory that really runs out, packs, and bitsandbytes' optimizers."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.train import run
from said import said
from tiny_base import save_tiny_base
from tiny_run import curve, recipe_of, same

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backward pass of fused attention does not repeat to the bit on a card; that of its math form does."""
    flags = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_flash_sdp(flags[0])
    torch.backends.cuda.enable_mem_efficient_sdp(flags[1])
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bf16"},
        {"dtype": "fp32"},
        {"dtype": "bf16", "packing": True, "batch_size": 1, "max_length": 64},
        {"dtype": "bf16", "gradient_checkpointing": True, "offload": True},
        {"dtype": "bf16", "quantize": "nf4"},
        {"dtype": "bf16", "quantize": "int8"},
        {"dtype": "bf16", "optimizer": "adamw_8bit", "r": 128},  # A of 128 x 32 is the smallest that it holds in 8 bits
        {"dtype": "bf16", "optimizer": "paged_adamw", "r": 128},
    ],
    ids=["bf16", "fp32", "packs", "offload", "nf4", "int8", "8_bits", "paged"],
)
def test_a_resume_on_a_card_is_the_unbroken_run_to_the_bit(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    plan = recipe_of(base, tmp_path, max_steps=5, save_every=2, **changes)
    whole = run(plan).out
    again = plan.model_copy(update={"out": str(tmp_path / "again")})
    with said("resume: from"):
        torch.manual_seed(77)
        found = run(again, resume=str(whole / "checkpoints" / "step-000004")).out
    assert curve(whole) == curve(found)
    assert same(whole, found)


RUNS_OUT = """
import json, sys, warnings
from pathlib import Path
import torch
from lora.train import run
from tiny_run import recipe_of, same

base, folder, room = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rows = folder / "long.jsonl"
rows.write_text("".join(json.dumps({"text": f"{n} " * 200}) + "\\n" for n in range(64)))
fields = {"data": str(rows), "batch_size": 16, "max_length": 128, "max_steps": 3, "dtype": "fp32"}
torch.backends.cuda.enable_flash_sdp(False)
torch.backends.cuda.enable_mem_efficient_sdp(False)
torch.backends.cuda.enable_cudnn_sdp(False)
torch.ones(1, device="cuda")
total = torch.cuda.get_device_properties(0).total_memory

torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room * 2**20) / total)
try:
    out = run(recipe_of(base, folder, **fields)).out
except OutOfMemoryError as error:
    print("REFUSED", error)
    sys.exit()
micro = json.loads((out / "run.json").read_text())["micro_batch"]
torch.cuda.set_per_process_memory_fraction(1.0)
small = {**fields, "batch_size": micro, "grad_accum": 16 // micro, "out": str(folder / "small")}
print("MICRO", micro, "SAME", same(out, run(recipe_of(base, folder, **small)).out))
"""


def with_room(base: Path, folder: Path, mib: int) -> subprocess.CompletedProcess[str]:
    """The run in a process of its own, which may take so many MiB of the card's memory."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", RUNS_OUT, str(base), str(folder), str(mib)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_memory_that_runs_out_halves_the_micro_batch_and_the_run_goes_on(base: Path, tmp_path: Path) -> None:
    """The logits of 16 rows are 64 MiB, and there are several of them."""
    done = with_room(base, tmp_path, 200)
    assert "out of memory; from here on" in done.stderr
    found = re.search(r"MICRO (\d+) SAME (\w+)", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) < 16
    assert found[2] == "True"


def test_memory_that_is_not_enough_for_one_row_is_told(base: Path, tmp_path: Path) -> None:
    assert "REFUSED" in with_room(base, tmp_path, 4).stdout
