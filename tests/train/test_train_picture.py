"""loss.png: there where there is a curve, small enough to send, and drawn from what metrics.jsonl says."""

import json
import random
from pathlib import Path

import pytest

from lora.train.metrics import METRICS_FILE
from lora.train.picture import PICTURE_FILE, draw, smoothed


def write(folder: Path, steps: int) -> None:
    chance = random.Random(0)
    lines = [{"step": 0, "eval_loss": 4.0}]
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 2 + chance.gauss(0, 0.3), "lr": 1e-4, "trained": chance.randrange(1, 99)})
        if step == 3:
            lines.append({"step": 3, "loss": None, "lr": 1e-4})  # not finite
    lines.append({"step": steps, "eval_loss": 2.5})
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize("steps", [1, 1000])
def test_a_run_has_a_picture_under_80_kb(tmp_path: Path, steps: int) -> None:
    from PIL import Image

    write(tmp_path, steps)
    assert draw(tmp_path) == tmp_path / PICTURE_FILE
    assert (tmp_path / PICTURE_FILE).stat().st_size < 80_000
    with Image.open(tmp_path / PICTURE_FILE) as picture:
        assert picture.size == (880, 550)
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert len(colours or []) > 20  # something is drawn


def test_a_run_without_a_step_has_none(tmp_path: Path) -> None:
    assert draw(tmp_path) is None
    (tmp_path / METRICS_FILE).write_text('{"step": 0, "eval_loss": 4.0}\n')
    assert draw(tmp_path) is None
    assert not (tmp_path / PICTURE_FILE).exists()


def test_the_curve_is_a_mean_over_tokens_of_the_last_steps() -> None:
    assert smoothed([4.0, 1.0, 1.0, 7.0], [1.0, 3.0, 1.0, 1.0], 2) == [4.0, 1.75, 1.0, 4.0]
