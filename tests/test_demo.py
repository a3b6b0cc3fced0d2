"""The demo runs, its measure is right, and what it ships is what it says."""

import json
import os
import random
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


def test_facts_are_copied_letter_for_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    prompt = "name: Blue Spice | Type: pub | food: Thai | near: Café Rouge"
    answers = ["Blue Spice is a pub near café rouge.", "Blue Spica serves Thai food by Café Rouges."]
    rows = [{"prompt": prompt, "generated": answer} for answer in answers]
    rows.append({"prompt": "name: Zizzi", "generated": "Zizzi"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert demo.copied("a.jsonl") == {"name": (2, 3), "near": (2, 2), "food": (1, 2)}


def test_an_exchanged_row_says_of_another_place_what_it_said() -> None:
    meaning = "name: Aromi | Type: coffee shop | food: English | area: riverside | near: Café Sicilia"
    text = "Aromi is an English coffee shop by the river, near Café Sicilia."
    assert prepare.told(meaning, text)
    assert not prepare.told(meaning, text + " Its coffee is good.")  # which would not fit a pub
    assert not prepare.told(meaning, text.replace("English ", ""))
    new, said = prepare.exchanged(meaning, text, random.Random(1), ["Lantern"])
    facts = prepare.facts(new)
    assert list(facts) == list(prepare.facts(meaning)) and facts["area"] == "riverside"
    assert prepare.told(new, said) or facts["Type"] in ("pub", "restaurant")  # words that told looks for
    assert not {"Aromi", "Café Sicilia"} & {facts["name"], facts["near"]}


def test_no_word_of_the_held_out_names_is_in_a_made_up_one() -> None:
    held_out = [str(row["prompt"]) for row in lines("test.jsonl")]
    known = prepare.known_words(held_out)
    names = {word for m in held_out for f in ("name", "near") for word in prepare.facts(m).get(f, "").lower().split()}
    assert len(known) > 500 and not names & {word.lower() for word in known}


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
    assert (
        len(re.findall(r"(?:before|after): BLEU +\d+\.\d, facts copied \d+ of \d+ \(name \d of 4, ", done.stdout)) == 3
    )
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
