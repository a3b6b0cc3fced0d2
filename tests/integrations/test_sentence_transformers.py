"""sentence-transformers' trainer over an adapted encoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import lora
from conftest import randomize
from lora.integrations import adapters_only
from tiny_base import save_tiny_base
from trained_by_others import ADAPTER, losses, names, same_adapters

PAIRS = [("a pub by the river", "the inn near water"), ("cheap Thai food", "low prices, Thai")] * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_base(tmp_path_factory.mktemp("encoder")))


def encoder(base: str) -> SentenceTransformer:
    torch.manual_seed(1)
    model = SentenceTransformer(base, device="cpu")
    lora.inject(model[0].model, r=2, targets=["q_proj", "v_proj"])  # the transformer inside: its names are the file's
    return model


def made(base: str, model: SentenceTransformer, folder: Path) -> Any:
    arguments = SentenceTransformerTrainingArguments(
        str(folder), max_steps=3, save_steps=2, logging_steps=1, per_device_train_batch_size=4, learning_rate=0.01,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([{"anchor": a, "positive": b} for a, b in PAIRS])
    return adapters_only(SentenceTransformerTrainer)(
        model=model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
    )


@pytest.mark.slow
def test_checkpoints_hold_the_adapter_and_go_on(base: str, tmp_path: Path) -> None:
    first = made(base, encoder(base), tmp_path / "first")
    first.train()
    assert names(tmp_path / "first" / "checkpoint-2") >= {*ADAPTER, "optimizer.pt"}
    assert "model.safetensors" not in names(tmp_path / "first" / "checkpoint-2")
    again = made(base, randomize(encoder(base)), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert losses(again) == losses(first)
    assert same_adapters(again.model, first.model)
    fresh = SentenceTransformer(base, device="cpu")
    lora.load(fresh[0].model, tmp_path / "first" / "checkpoint-3")
    answers = [model.encode(["a quiet cafe"]) for model in (fresh, first.model)]
    assert np.array_equal(*answers)
