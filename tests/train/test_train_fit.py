"""The batch that fits: with a memory and peaks that are made up, and once with the real estimate."""

from pathlib import Path
from typing import Any

import pytest

from lora.errors import OutOfMemoryError
from lora.train.fit import SHARE, available, largest_batch
from lora.train.recipe import Recipe

BASE, ROW = 1000, 100  # bytes of a made-up run: what is there, and each row more


def fitted(free: int, batch_size: int = 8, grad_accum: int = 3, **settings: Any) -> tuple[Any, list[int]]:
    tried: list[int] = []

    def peak(rows: int, times: int) -> int:
        assert rows * times == batch_size * grad_accum
        tried.append(rows)
        return BASE + ROW * rows

    recipe = Recipe.of(model="m", data="d", out="o", batch_size=batch_size, grad_accum=grad_accum)
    return largest_batch(recipe, free=free, peak=peak, **settings), tried


@pytest.mark.parametrize(
    ("free", "rows"), [(1100, 1), (1200, 2), (1499, 4), (1600, 6), (1800, 8), (2200, 12), (3399, 12), (3400, 24)]
)
def test_the_largest_divisor_of_the_rows_of_a_step_that_fits(free: int, rows: int) -> None:
    found, tried = fitted(int(free / SHARE) + 1)
    assert (found.batch_size, found.grad_accum) == (rows, 24 // rows)
    assert len(tried) == len(set(tried)) <= 4  # of eight divisors
    assert found.peak == BASE + ROW * rows
    changed = found.recipe(Recipe.of(model="m", data="d", out="o", batch_size=8, grad_accum=3))
    assert changed.batch_size * changed.grad_accum == 24
    assert f"batch_size {rows}, grad_accum {24 // rows} (asked: 8 and 3; 24 rows" in str(found)


def test_not_even_one_row_is_an_error_of_memory() -> None:
    with pytest.raises(OutOfMemoryError, match="one row takes .* try gradient_checkpointing") as caught:
        fitted(1100)
    assert caught.value.exit_code == 4


def test_fit_by_the_estimate_itself(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=500
    ).save_pretrained(tmp_path)
    recipe = Recipe.of(model=str(tmp_path), data="d", out="o", batch_size=64, targets="all-linear")
    found = largest_batch(recipe, longest=128, free=24 << 20)
    assert 1 < found.batch_size < 64 and found.batch_size * found.grad_accum == 64
    assert found.peak <= SHARE * found.free


def test_the_memory_of_a_machine_and_of_its_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       8000 kB\nMemAvailable:   5000 kB\n")
    assert available(meminfo, tmp_path) == 5000 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available(meminfo, tmp_path) == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000\n")
    assert available(meminfo, tmp_path) == 2000
    assert available(Path("/proc/meminfo"), Path("/sys/fs/cgroup")) > 0
