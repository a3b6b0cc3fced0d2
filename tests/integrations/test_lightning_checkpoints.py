"""Lightning over an adapted model: checkpoints without the base."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lora
from lora.integrations import LightningAdapters
from trained_by_others import adapted, rows, same_adapters, wide_llama


class Task(lightning.LightningModule):
    """With a head of its own, which trains beside the adapter and is no part of the adapted model."""

    def __init__(self, r: int = 2, inject: bool = True) -> None:
        super().__init__()
        self.model = adapted(r) if inject else wide_llama()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss = self.model(**batch).loss * self.scale
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def fit(task: Task, folder: Path, steps: int, resume: Path | None = None, **checkpoint: Any) -> Any:
    lightning.seed_everything(0, verbose=False)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1, **checkpoint)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saver, LightningAdapters()],
    )  # fmt: skip
    data = [{key: torch.tensor(value) for key, value in row.items()} for row in rows(8)]
    trainer.fit(task.train(), torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=resume)  # type: ignore[arg-type]
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lightning")
    fit(Task(), folder, 2)
    return folder


def test_a_checkpoint_holds_what_trains_and_not_the_base(folder: Path) -> None:
    state = torch.load(folder / "step=2.ckpt", weights_only=True)["state_dict"]
    assert {name for name in state if ".lora." not in name} == {"scale"}
    assert len(state) == 1 + 8
    assert (folder / "step=2.ckpt").stat().st_size < 4 * sum(p.numel() for p in wide_llama().parameters()) / 3


def test_a_run_goes_on_from_it(folder: Path, tmp_path: Path) -> None:
    unbroken, again = Task(), Task()
    fit(unbroken, tmp_path / "a", 3)
    state = torch.load(folder / "step=2.ckpt", weights_only=True)["state_dict"]
    trainer = fit(again, tmp_path / "b", 2, resume=folder / "step=2.ckpt")
    assert trainer.global_step == 2
    assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())
    assert not same_adapters(unbroken, again)
    fit(again, tmp_path / "c", 4, resume=folder / "step=2.ckpt")
    assert not all(torch.equal(again.state_dict()[name], value) for name, value in state.items())
    lora.save(again.model, tmp_path / "out")
    ids = torch.tensor([[3, 4, 5]])
    fresh = lora.load(wide_llama(), tmp_path / "out").eval()
    assert torch.equal(fresh(ids).logits, again.model.eval()(ids).logits)


def test_one_of_other_adapters_is_refused(folder: Path, tmp_path: Path) -> None:
    task = Task()
    lora.inject(task.model, r=2, targets=["k_proj"], name="second")
    with pytest.raises(lora.LoraError, match="4 are missing: model.*lora.second"):
        fit(task, tmp_path, 4, resume=folder / "step=2.ckpt")
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit(Task(r=4), tmp_path, 4, resume=folder / "step=2.ckpt")


def test_what_would_write_the_base_or_carries_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lora.LoraError, match=r"ModelCheckpoint\(save_weights_only=True\) asks no callback"):
        fit(Task(), tmp_path, 2, save_weights_only=True)
    with pytest.raises(lora.LoraError, match="pl_module: it carries no adapter"):
        fit(Task(inject=False), tmp_path, 2)
