"""The examples of LLaMA-Adapter run, and what they ask and measure is what they say."""

import sys
from pathlib import Path

import pytest
import torch

from tiny_base import ROOT

sys.path.insert(0, str(ROOT / "examples" / "llama_adapter"))
import encoder
import instructions
import pictures


def test_the_pictures_in_a_few_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--smoke", "--out", str(tmp_path), "--gates", "zero"])
    pictures.main()
    assert "gates zero, seed 0: What does the picture show?" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file() and (tmp_path / "pictures.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_pictures_reach_their_goal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--seeds", "1", "--out", str(tmp_path)])
    pictures.main()
    assert (tmp_path / "pictures.png").stat().st_size < 80_000


def test_no_held_out_picture_is_trained_on_and_features_do_not_depend_on_the_batch() -> None:
    found = encoder.read_pictures(None)
    assert found.trained == int(0.8 * len(found.pixels)) and set(found.labels.tolist()) == set(range(10))
    made = encoder.PictureEncoder(1, 8).eval()
    tokens = encoder.encode(made, found.pixels[:6])
    assert tokens.shape == (6, encoder.GRID, encoder.WIDTH)
    every, one = encoder.scales(tokens), encoder.scales(encoder.encode(made, found.pixels[2:3]))
    assert every.shape == (6, encoder.SCALES, encoder.WIDTH) and torch.allclose(every[2:3], one, atol=1e-5)
    assert torch.allclose(every[:, 0], tokens.mean(1), atol=1e-5)


def test_a_folder_of_pictures_is_read_by_class(tmp_path: Path) -> None:
    from PIL import Image

    for name, shade in (("cat", 250), ("dog", 5)):
        for i in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (40, 20), (shade,) * 3).save(tmp_path / name / f"{i}.png")
    found = encoder.read_pictures(str(tmp_path))
    assert found.names == ["cat", "dog"] and found.pixels.shape == (6, 3, 32, 32)
    assert all((pixels.mean() > 0.5) == (label == 0) for pixels, label in zip(found.pixels, found.labels, strict=True))
    assert {question for _, question, _ in pictures.asked(found, digits=False)} == {pictures.WHICH}


def test_instructions_are_three_rows_of_one_place() -> None:
    write, facts, name = instructions.instructions("name: Aromi | Type: pub", "Aromi is a pub.")
    assert write[1:] == ("name: Aromi | Type: pub", "Aromi is a pub.") and facts[1:] == write[:0:-1]
    assert name.output == "Aromi"
    train, held_out = instructions.shipped()
    assert len(held_out) == 180 and not {r.input for r in train} & {r.input for r in held_out}


def test_the_instructions_in_a_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["instructions.py", "--smoke", "--methods", "llama-adapter-v2"])
    instructions.main()
    out = capsys.readouterr().out
    assert "before: held-out loss" in out and "llama-adapter-v2, rate" in out and "wanted:" in out
