"""diffusers: the attention of a UNet, adapted, trained, saved and loaded, in its own loop."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize, same_bits, snapshot
from lora.integrations import merged_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import DDPMScheduler, UNet2DConditionModel

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip


def inputs() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    sample, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 16, generator=draw)
    return {"sample": sample, "timestep": torch.tensor([3, 7]), "encoder_hidden_states": text}


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    schedule, given = DDPMScheduler(num_train_timesteps=10), inputs()
    noise = torch.randn(given["sample"].shape, generator=torch.Generator().manual_seed(3))
    given["sample"] = schedule.add_noise(given["sample"], noise, given["timestep"])
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(**given).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_it_trains_is_saved_and_gives_the_same_on_a_fresh_unet(tmp_path: Path) -> None:
    model = lora.inject(unet(), r=4, targets=TARGETS)
    losses = train(model.train(), 5)
    assert losses[-1] < losses[0]
    lora.save(model, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 4 * sum(p.numel() for p in unet().parameters()) / 3
    fresh = lora.load(unet(), tmp_path)
    assert torch.equal(fresh.eval()(**inputs()).sample, model.eval()(**inputs()).sample)


def test_save_pretrained_of_a_unet_says_that_the_adapter_is_left(tmp_path: Path) -> None:
    model = randomize(lora.inject(unet(), r=4, targets=TARGETS))
    with pytest.warns(lora.LoraWarning, match="save_pretrained: default will not come back"):
        model.save_pretrained(tmp_path)
    wanted = dict(merged_weights(model))
    lora.merge(model, unload=True)
    model.save_pretrained(tmp_path / "merged")
    assert same_bits(snapshot(UNet2DConditionModel.from_pretrained(tmp_path / "merged")), wanted)
