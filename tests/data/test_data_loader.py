"""The order as transformers' Trainer sees it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lora.data.loader import EpochBatches, train_loader
from lora.data.order import batches

LENGTHS = [3 + row * row % 7 for row in range(11)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.weight * rows).sum()}


class OrderedTrainer(Trainer):
    """Notes the rows of each micro-batch, and the global generator's state at the first."""

    def get_train_dataloader(self) -> Any:
        self.seen: list[list[int]] = []
        collate = lambda rows: {"rows": torch.tensor(rows)}  # noqa: E731
        return self.accelerator.prepare(
            train_loader(range(len(LENGTHS)), LENGTHS, 2, seed=3, group=True, collate=collate)
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:
        self.seen.append(inputs["rows"].tolist())
        return super().training_step(model, inputs, *rest)


def train(folder: Path, resume: str | None = None, accumulation: int = 1, **settings: Any) -> OrderedTrainer:
    arguments = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, num_train_epochs=3, save_strategy="steps",
        gradient_accumulation_steps=accumulation, dataloader_pin_memory=False, logging_strategy="no", **settings,
    )  # fmt: skip
    trainer = OrderedTrainer(Net(), arguments, train_dataset=range(len(LENGTHS)))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(("accumulation", "at"), [(1, 8), (4, 3)])
def test_a_resumed_trainer_goes_on_at_the_next_batch_of_the_same_order(
    tmp_path: Path, accumulation: int, at: int
) -> None:
    whole = [step for epoch in range(3) for step in batches(LENGTHS, 2, 3, epoch, group=True)]
    assert train(tmp_path, accumulation=accumulation, save_steps=at).seen == whole
    # 6 batches an epoch: the 8th is within the second; of 2 steps an epoch, the 3rd is the second's first.
    done = at if accumulation == 1 else 6 + 4
    resumed = train(tmp_path, f"{tmp_path}/checkpoint-{at}", accumulation, save_steps=100)
    assert resumed.seen == whole[done:]


def test_no_global_generator_moves() -> None:
    before = torch.get_rng_state()
    loader = train_loader(LENGTHS, LENGTHS, 4, seed=0, group=False, collate=list)
    assert sum(map(len, loader)) == 11 and len(loader) == 3
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_reaches_the_order_through_a_wrapper_of_it() -> None:
    order = EpochBatches(LENGTHS, 2, 3, group=False)
    first = list(order)
    order.sampler.set_epoch(1)  # how accelerate reaches it from a resumed loader
    assert list(order) == batches(LENGTHS, 2, 3, 1, group=False) != first
