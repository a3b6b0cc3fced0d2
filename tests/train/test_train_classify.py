"""A classifier's run: rows into labels, a head that trains whole, and the same answers from a fresh base."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora import LoraConfig
from lora.bases import loadable
from lora.data.labels import labelled_texts
from lora.data.sound import Placed
from lora.errors import DataError, LoraError
from lora.train.base import load_tokenizer
from lora.train.classify import (
    LabelCollator,
    accuracy_f1,
    class_logits,
    encode_labelled,
    head_modules,
    label_names,
    load_classifier,
    longest_text,
    pad_id,
    with_head,
)
from tiny_base import save_tiny_base, save_tiny_encoder

WORDS = {"good": ("fine", "warm", "bright"), "bad": ("dull", "cold", "grim")}
ROWS = [
    {"text": f"the film was {word} {'and long ' * n}", "label": label}
    for n in range(4)
    for label, words in WORDS.items()
    for word in words
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def tok(encoder: Path) -> Any:
    return load_tokenizer(str(encoder))


def test_labels_are_named_by_the_rows(encoder: Path) -> None:
    assert label_names(ROWS, str(encoder)) == ["bad", "good"]
    numbers = [{"sentence": "x", "label": n} for n in (10, 2, 2)]
    assert label_names(numbers, str(encoder)) == ["2", "10"]
    assert label_names([{"text": "x", "label": " 1"}, {"text": "x", "label": True}], str(encoder)) == ["1", "True"]


def test_rows_become_tokens_and_numbers(encoder: Path, tok: Any) -> None:
    data = encode_labelled(ROWS, tok, 10, ["bad", "good"])
    assert [row["labels"] for row in data.rows] == [[int(row["label"] == "good")] for row in ROWS]
    assert data.rows[0]["input_ids"] == tok(ROWS[0]["text"])["input_ids"]
    assert max(len(row["input_ids"]) for row in data.rows) == 10 < data.longest
    assert 0 < data.cut < len(ROWS)
    assert f"labels: bad, good\n{data.cut} texts are longer than max_length=10" in str(data)
    assert longest_text(str(encoder), tok) == 64
    batch = LabelCollator(0)(data.rows[:9])
    assert batch["labels"].tolist() == [row["labels"][0] for row in data.rows[:9]]
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in data.rows[:9]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "x", "label": "a"}] * 2, "all rows have the label 'a'; a classifier needs two"),
        ([{"text": "x", "label": str(n)} for n in range(102)], "102 rows have 102 different labels"),
        ([{"text": "x", "label": "a"}, {"text": "x"}], "row 2: its fields are .*; a classifier's rows have text or"),
        ([{"text": " ", "label": "a"}], "row 1: text is ' '"),
        ([Placed({"text": "x", "label": 0.5}, 7, "b.jsonl")], "row 7 of b.jsonl: label is 0.5; it must be a name or"),
    ],
)
def test_rows_that_teach_no_label(encoder: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_names(rows, str(encoder))


def test_a_label_that_training_had_not_is_named_by_its_row(tok: Any) -> None:
    with pytest.raises(DataError, match="eval_data: row 2: its label is none of good, bad"):
        encode_labelled([ROWS[0], {"text": "x", "label": "so-so"}], tok, 64, ["good", "bad"], "eval_data")


def test_all_rows_without_a_text_or_a_label_are_told_at_once() -> None:
    rows = [ROWS[0], {"text": "x"}, {"text": " ", "label": "good"}, ROWS[1], {"text": "y", "label": 0.5}]
    with pytest.raises(DataError) as told:
        labelled_texts(rows)
    first, *faults = str(told.value).splitlines()
    assert first == "data: 3 rows cannot be trained on; correct or remove them"
    assert [fault.split(": ")[0] for fault in faults] == ["  - row 2", "  - row 3", "  - row 5"]


def test_untrained_head_trains_whole_and_comes_back(encoder: Path, tok: Any, tmp_path: Path) -> None:
    """The default for task heads: without it the head stayed random, and a reload was 2.0 off without a word."""
    names = label_names(ROWS, str(encoder))
    data = encode_labelled(ROWS, tok, 64, names)
    torch.manual_seed(0)
    model = load_classifier(str(encoder), names, tok, torch.float32)
    assert (model.config.num_labels, model.config.id2label[1]) == (2, "good")
    config = with_head(LoraConfig(r=4, targets="all-linear"), model)
    assert head_modules(model) == config.train == ["classifier", "bert.pooler"]
    lora.inject(model, config=config)
    before = model.classifier.weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    batch = LabelCollator(pad_id(model, tok))(data.rows)
    for _ in range(15):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert not torch.equal(model.classifier.weight, before)
    logits = class_logits(model, data.rows, pad_id(model, tok), batch_size=5)
    right = [row["labels"][0] for row in data.rows]
    assert accuracy_f1(logits.argmax(1).tolist(), right) == {"accuracy": 100.0, "f1": 100.0}
    lora.save(model, tmp_path / "adapter")

    torch.manual_seed(9)  # another fresh head
    again = load_classifier(str(encoder), names, tok, torch.float32)
    other = class_logits(again, data.rows, 0)
    lora.load(again, tmp_path / "adapter")
    assert torch.equal(class_logits(again, data.rows, pad_id(again, tok), batch_size=5), logits)
    with lora.disabled(again):
        assert torch.equal(class_logits(again, data.rows, 0), other)
    lora.merge(again)
    torch.testing.assert_close(class_logits(again, data.rows, 0), logits, atol=1e-4, rtol=1e-4)


def test_a_decoder_classifies_by_its_last_token(tmp_path: Path) -> None:
    """Its padding is told apart from a row's own tokens, whatever the tokenizer calls them."""
    folder = save_tiny_base(tmp_path)
    tok = load_tokenizer(str(folder))
    model = load_classifier(str(folder), ["bad", "good"], tok, torch.float32)
    assert with_head(LoraConfig(), model).train == ["score"]
    rows = encode_labelled(ROWS, tok, 64, ["bad", "good"]).rows
    together, alone = (class_logits(model, rows, pad_id(model, tok), batch_size=size) for size in (24, 1))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_stored_classifier_keeps_its_labels(encoder: Path, tok: Any, tmp_path: Path) -> None:
    model = load_classifier(str(encoder), ["good", "bad"], tok, torch.float32)
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    assert label_names(ROWS, str(tmp_path)) == ["good", "bad"]  # its order, not the alphabet's
    with pytest.raises(LoraError, match="has a head for the labels good, bad, and the rows have 0, 1"):
        label_names([{"text": "x", "label": n} for n in (0, 1)], str(tmp_path))
    again = load_classifier(str(tmp_path), ["good", "bad"], tok, torch.float32)
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert with_head(LoraConfig(train=["classifier"]), again).train[0] == "classifier"


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_fresh_head_stays_out_of_the_quantization(encoder: Path, tok: Any, quantize: str) -> None:
    """It would be a packed weight without values that trains nothing."""
    pytest.importorskip("bitsandbytes")
    model = load_classifier(str(encoder), ["bad", "good"], tok, torch.float32, quantize)
    assert model.is_quantized
    lora.inject(model, config=with_head(LoraConfig(targets=["query"]), model))
    model.train()(**LabelCollator(0)(encode_labelled(ROWS, tok, 64, ["bad", "good"]).rows)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert type(model.classifier.weight.grad) is torch.Tensor


def test_a_base_that_is_stored_quantized_has_no_place_for_a_head(encoder: Path, tok: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModel

    settings = loadable()["nf4"].load_settings("nf4", torch.float32)
    AutoModel.from_pretrained(encoder, quantization_config=settings).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    with pytest.raises(LoraError, match="is stored in nf4, in which a fresh head cannot be made; give"):
        load_classifier(str(tmp_path), ["bad", "good"], tok, torch.float32)
