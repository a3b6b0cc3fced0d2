"""accelerate's own loop: save_state and load_state with adapters in place of the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import lora
from conftest import randomize
from lora.integrations import adapters_only
from trained_by_others import ADAPTER, adapted, names, rows, same_adapters, size, wide_llama


def prepared(*models: nn.Module) -> tuple[Any, ...]:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for m in models for p in m.parameters() if p.requires_grad], lr=0.01)
    return adapters_only(accelerator), *accelerator.prepare(*models, optimizer)


def step(accelerator: Any, model: Any, optimizer: Any) -> float:
    ids = torch.tensor([row["input_ids"] for row in rows(4)])
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def test_a_state_holds_the_adapter_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared(adapted().train())
    step(accelerator, model, optimizer)
    accelerator.save_state(str(tmp_path))
    wanted = [step(accelerator, model, optimizer) for _ in range(2)]
    assert names(tmp_path / "adapter_0") == ADAPTER
    assert not [name for name in names(tmp_path) if name.startswith("model")]
    assert size(tmp_path, but=("random_states_0.pkl",)) < sum(p.numel() for p in wide_llama().parameters())
    again, other, its = prepared(randomize(adapted()).train())
    again.load_state(str(tmp_path))
    assert [step(again, other, its) for _ in range(2)] == wanted  # dropout too
    assert same_adapters(other, model)


def test_a_model_without_adapters_beside_it_is_written_as_ever(tmp_path: Path) -> None:
    def both() -> tuple[Any, ...]:
        torch.manual_seed(0)
        return prepared(nn.Linear(3, 2), randomize(adapted()), nn.Linear(2, 2))

    accelerator, *first, _ = both()
    assert adapters_only(accelerator) is accelerator  # a second time does nothing
    accelerator.save_state(str(tmp_path))
    assert {"model.safetensors", "model_1.safetensors", "adapter_1"} <= names(tmp_path)
    again, *second, _ = both()
    with torch.no_grad():
        for parameter in (p for model in second for p in model.parameters() if p.requires_grad):
            parameter.zero_()
    again.load_state(str(tmp_path))
    assert all(same_adapters(model, other) for model, other in zip(first, second, strict=True))


def test_what_trains_beside_the_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted()
    model.lm_head.requires_grad_(True)
    accelerator, *_ = prepared(model)
    with pytest.raises(lora.LoraError, match="outside its adapters train"):
        accelerator.save_state(str(tmp_path))
