"""Did it work? Each question answered yes, and no, by adapters that are made so."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora.data.encode import Encoded, encode_rows
from lora.data.template import PromptTemplate
from lora.errors import CheckError
from lora.train import outcome as module
from lora.train.answers import Answer
from lora.train.base import load_base
from lora.train.losses import held_out_loss
from lora.train.outcome import Material, Outcome, check, spend
from lora.train.probe import Probe, logits_of
from tiny_base import load_example_tokenizer, save_tiny_base

ROWS = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))} for n in range(2, 8)]
Load = Callable[[], Any]


@pytest.fixture(scope="module")
def template() -> PromptTemplate:
    return PromptTemplate(load_example_tokenizer())


@pytest.fixture(scope="module")
def rows(template: PromptTemplate) -> list[Encoded]:
    return encode_rows(ROWS, template, 128).rows


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = str(save_tiny_base(tmp_path_factory.mktemp("base")))
    return lambda: load_base(folder, torch.float32)


@pytest.fixture(scope="module")
def trained(load: Load, rows: list[Encoded], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Probe]:
    """An adapter that has learned the rows, and what the model made of one of them in memory."""
    model = lora.inject(load(), r=16, targets="all-linear", train=["lm_head", "model.embed_tokens"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    from lora.data.collate import PaddingCollator

    batch = PaddingCollator(0)(rows)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("adapter")
    lora.save(model, folder)
    return folder, Probe.of(model, rows[0]["input_ids"])


@pytest.fixture
def material(rows: list[Encoded], template: PromptTemplate) -> Material:
    return Material(rows, rows, template, seen=720)


def verdicts(found: Outcome) -> list[str]:
    return [line.verdict for line in found.lines]


def test_an_adapter_that_learned_passes(
    load: Load, trained: tuple[Path, Probe], material: Material, tmp_path: Path
) -> None:
    folder, probe = trained
    found = check(folder, load, probe, material)
    assert verdicts(found) == ["ok", "ok", "ok"], str(found)
    assert [str(line).split(": ")[0] for line in found.lines] == ["read back", "stops", "loss"]
    assert "to the bit" in found.lines[0].text
    assert "6 of 6 answers to held-out rows end" in found.lines[1].text
    assert "on 6 training rows" in found.lines[2].text
    found.judge(folder)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["lines"][0]["verdict"] == "ok"
    # The same in another process: by what run.json keeps.
    again = Probe.read(json.loads(json.dumps(probe.record(), allow_nan=False)))
    assert again.difference(logits_of(lora_loaded(load, folder), again.ids)).exact


def lora_loaded(load: Load, folder: Path) -> Any:
    model = load()
    lora.load(model, folder)
    return model


def test_a_file_that_is_not_what_was_trained_fails(
    load: Load, trained: tuple[Path, Probe], material: Material, tmp_path: Path
) -> None:
    folder, probe = trained
    model = lora_loaded(load, folder)
    with torch.no_grad():
        next(p for p in model.parameters() if p.shape[0] == 16).mul_(1.001)  # an A
    lora.save(model, tmp_path)
    found = check(tmp_path, load, probe, replace(material, rows=material.rows[:2], asked=material.asked[:1]))
    assert verdicts(found) == ["failed", "ok", "ok"]
    assert "up to 0.0e+00 is allowed (float32)" in found.lines[0].text
    with pytest.raises(CheckError, match="did not pass its check:\n  - read back: failed") as error:
        found.judge(tmp_path)
    assert error.value.exit_code == 6


def test_what_cannot_be_read_back_fails(
    load: Load, trained: tuple[Path, Probe], material: Material, tmp_path: Path
) -> None:
    folder, probe = trained
    content = bytearray((folder / "adapter_model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    found = check(tmp_path, load, probe, material)
    assert verdicts(found) == ["failed", "not judged", "not judged"]


def save_fresh(load: Load, folder: Path, change: Callable[[Any], None] = lambda model: None) -> Probe:
    model = lora.inject(load(), r=4, targets="all-linear")
    with torch.no_grad():
        change(model)
    lora.save(model, folder)
    return Probe.of(model, [5, 6, 7])


@pytest.mark.parametrize("seen", [6, 720])
def test_an_adapter_that_changes_nothing_fails_however_short_the_run(
    load: Load, material: Material, tmp_path: Path, seen: int
) -> None:
    probe = save_fresh(load, tmp_path)
    found = check(tmp_path, load, probe, replace(material, asked=material.asked[:2], seen=seen))
    assert verdicts(found) == ["ok", "not judged" if seen == 6 else "failed", "failed"]
    assert "the adapter changes nothing" in found.lines[2].text


@pytest.mark.parametrize(
    ("now", "before", "seen", "verdict", "why"),
    [
        ([1.0, 2.0, 3.0], [2.0, 3.1, 3.9], 6, "ok", "2.0000 with the adapter, 3.0000 for the base, on 3 training rows"),
        ([2.0, 3.1, 3.9], [1.0, 2.0, 3.0], 6, "failed", "makes them worse; lower lr"),
        ([1.0, 2.0, 3.0], [1.1, 2.1, 2.7], 6, "not judged", "noise (2.7e-01); the run saw 6 answers, and from 200"),
        ([1.0, 2.0, 3.0], [1.1, 2.1, 2.7], None, "failed", "train longer, or at a higher lr"),
        ([1.0], [1.1], 1, "ok", ""),
        ([1.0, math.nan], [1.1, 1.1], 6, "failed", "it is no number"),
    ],
)
def test_the_loss_has_to_fall_beyond_noise(
    load: Load, rows: list[Encoded], now: list[float], before: list[float], seen: int | None, verdict: str, why: str
) -> None:
    model, losses = lora.inject(load(), r=2, targets=["q_proj"]), iter(now + before)
    line = module._moved(model, Material(rows[: len(now)], [], None, seen, loss=lambda model, row: next(losses)))
    assert (line.verdict, why in line.text) == (verdict, True), line


@pytest.mark.parametrize(
    ("now", "before", "verdict", "why"),
    [
        (
            [20.0, 21.0],
            [10.0, 10.5],
            "failed",
            "; 20.5000 and 10.2500 on 2 held-out rows: the adapter makes them worse",
        ),
        ([1.0, 2.0, 3.0], [1.1, 2.1, 2.7], "ok", "2.0000 and 1.9667 on 3 held-out rows"),
        ([2.0], [1.0], "ok", "on 1 held-out rows"),
        ([math.nan], [1.0], "failed", "no number"),
    ],
)
def test_a_loss_on_held_out_rows_above_the_bases_fails_beyond_noise(
    load: Load, rows: list[Encoded], now: list[float], before: list[float], verdict: str, why: str
) -> None:
    model, losses = lora.inject(load(), r=2, targets=["q_proj"]), iter(now + before)
    material = Material(rows, [], None, 6, loss=lambda model, row: next(losses), held_out=rows[: len(now)])
    line = module._unharmed(model, material, module.Line("loss", "ok", "better"))
    assert (line.verdict, why in line.text) == (verdict, True), line


def test_texts_and_classifiers_have_no_answer_to_end(load: Load, template: PromptTemplate) -> None:
    texts = encode_rows([{"text": "The vaults are by the river."}], template, 128).rows
    model = load()
    assert module._stops(model, Material(texts, texts, template, None)).verdict == "not judged"
    assert module._stops(model, Material(texts, texts, None, None)).verdict == "not judged"


def test_an_answer_that_is_too_long_is_not_waited_for(load: Load, template: PromptTemplate) -> None:
    long = encode_rows([{"prompt": "a", "completion": "so " * 60}], template, 128).rows
    line = module._stops(load(), Material(long, long, template, None))
    assert (line.verdict, "too long to wait for" in line.text) == ("not judged", True)


def test_an_answer_that_was_cut_off_did_not_end(
    load: Load, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short for want of room in the model, not for a stop token."""
    monkeypatch.setattr(module, "answers", lambda model, template, asked, *sizes: [Answer([5], False) for _ in asked])
    line = module._stops(load(), material)
    assert (line.verdict, "0 of 6 answers" in line.text) == ("failed", True)


def test_without_a_record_the_read_back_is_told_and_not_judged(load: Load) -> None:
    assert module._read_back(load(), None).verdict == "not judged"


def test_a_record_of_another_machine_allows_rounding_and_not_the_bare_base(
    load: Load, trained: tuple[Path, Probe]
) -> None:
    folder, probe = trained
    model = lora_loaded(load, folder)
    nearly = replace(probe, logits=None, sha256="", top=[(i, v * (1 + 1e-6)) for i, v in probe.top])
    assert module._read_back(model, nearly).verdict == "ok"
    with lora.disabled(model):
        assert module._read_back(model, nearly).verdict == "failed"


def test_a_spent_model_holds_nothing(load: Load, rows: list[Encoded]) -> None:
    model = lora.inject(load(), r=2, targets=["q_proj"])
    spend(model)
    assert sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) == 0


def test_the_loss_is_the_mean_over_a_rows_trained_tokens(load: Load, material: Material, rows: list[Encoded]) -> None:
    from lora.data.collate import PaddingCollator

    model = load()
    assert material.loss_of(model, rows[0]) == held_out_loss(model, [PaddingCollator(0)([rows[0]])])
