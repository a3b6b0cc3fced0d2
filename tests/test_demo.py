"""The demo runs, its measure is right, and what it ships is what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu

from tiny_base import ROOT

sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "examples" / "e2e"))
import demo
import prepare


def lines(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (ROOT / "examples" / "e2e" / name).read_text(encoding="utf-8").splitlines()]


def test_no_held_out_meaning_is_trained_on() -> None:
    train, test = lines("train.jsonl"), lines("test.jsonl")
    assert len(train) == prepare.TRAIN_ROWS
    assert len(test) == prepare.HELD_OUT_MEANINGS
    meanings = {row["prompt"] for row in test}
    assert len(meanings) == len(test)
    assert not meanings & {row["prompt"] for row in train}
    assert all(row["references"] for row in test)


@pytest.mark.parametrize(
    ("tokenized", "plain"),
    [
        ("It 's a family - friendly pub , near Café X .", "It's a family-friendly pub, near Café X."),
        ("price : £ 20 - 25", "price: £20-25"),
        ("They aren 't cheap , and do n't rate well !", "They aren't cheap, and don't rate well!"),
        ("called ' Aromi ' here", "called ' Aromi ' here"),
    ],
)
def test_detokenizing(tokenized: str, plain: str) -> None:
    assert prepare.detokenize(tokenized) == plain


def test_bleu_counts_every_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers with unlike numbers of references, against sacrebleu one sentence's references at a time."""
    answered = [
        {"generated": "The Mill is a cheap pub.", "references": ["A cheap pub, The Mill.", "the mill is a cheap pub."]},
        {"generated": "Zizzi serves food by the river.", "references": ["Zizzi is by the river."]},
    ]
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))
    # A missing reference counts like a repeated one: n-gram counts are clipped by the largest.
    padded = [[answered[0]["references"][i], answered[1]["references"][0]] for i in range(2)]
    expected = sacrebleu.corpus_bleu([str(row["generated"]) for row in answered], padded, lowercase=True).score
    assert demo.bleu("a.jsonl") == pytest.approx(expected)
    assert demo.bleu("a.jsonl") > 40
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"generated": "THE MILL IS A CHEAP PUB.", **_only(answered[0])}) + "\n"
    )
    assert demo.bleu("b.jsonl") == pytest.approx(100.0)


def _only(row: dict[str, object]) -> dict[str, object]:
    return {"references": row["references"]}


def test_the_whole_demo_in_a_few_steps(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--out", str(tmp_path)],
        env={**os.environ, "LORA_DEMO_SMOKE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for command in ("lora generate", "lora train", "lora inspect", "lora merge"):
        assert f"$ {command} " in done.stdout
    assert re.search(r"BLEU before: \d+\.\d   after: \d+\.\d", done.stdout)
    assert "same, to the character: 4 of 4" in done.stdout
    assert f"The adapter is in {tmp_path}/adapter" in done.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_demo_reaches_its_goal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 of 60" in done.stdout
