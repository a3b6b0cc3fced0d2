"""Another kind of features than pictures: the spectrum of short sounds, which a frozen decoder learns to name."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lora import llama_adapter
from lora.llama_adapter import condition
from tiny_decoders import llama

FRAMES, SAMPLES = 4, 32
QUESTION, NAMES = torch.tensor([5, 6, 7]), torch.tensor([20, 21, 22, 23])  # a word for each of four shapes of sound


def sounds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(spectra (count, frames, bins), which shape each has): a steady low tone, a high one, one that rises, one that
    falls. Pitch, phase and noise are drawn."""
    draw = torch.Generator().manual_seed(seed)
    shape = torch.randint(4, (count,), generator=draw)
    low, high = 0.06 + 0.04 * torch.rand(count, generator=draw), 0.30 + 0.06 * torch.rand(count, generator=draw)
    start, end = (
        torch.where((shape == 0) | (shape == 2), low, high),
        torch.where((shape == 0) | (shape == 3), low, high),
    )
    place = torch.linspace(0, 1, FRAMES * SAMPLES)
    pitch = start[:, None] + (end - start)[:, None] * place
    phase = 2 * math.pi * (pitch.cumsum(1) + torch.rand(count, 1, generator=draw))
    wave = phase.sin() + 0.2 * torch.randn(count, FRAMES * SAMPLES, generator=draw)
    spectrum = torch.fft.rfft(wave.view(count, FRAMES, SAMPLES)).abs().log1p()
    return (spectrum - spectrum.mean()) / spectrum.std(), shape


def asked(shape: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, labels): the question and the sound's name."""
    ids = torch.cat([QUESTION.expand(len(shape), -1), NAMES[shape][:, None]], 1)
    return ids, ids.masked_fill(torch.arange(ids.shape[1]) < len(QUESTION), -100)


def right(model: Any, features: Tensor, shape: Tensor) -> float:
    question = QUESTION.expand(len(shape), -1)
    with condition(model, features):
        made = model.generate(question, attention_mask=torch.ones_like(question), max_new_tokens=1, do_sample=False)
    return float((made[:, -1] == NAMES[shape]).float().mean())


@pytest.mark.parametrize(("fusion", "rate"), [("late", 2e-2), ("early", 5e-3)])
def test_a_frozen_decoder_learns_to_name_sounds(fusion: str, rate: float) -> None:
    heard, shapes = sounds(256, seed=1)
    held_out, wanted = sounds(64, seed=2)
    torch.manual_seed(0)
    model = llama_adapter.inject(llama(), layers=1, features=heard.shape[1:], fusion=fusion)
    before = right(model, held_out, wanted)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(120):
        rows = torch.arange(32) + 32 * (step % 8)
        ids, labels = asked(shapes[rows])
        with condition(model, heard[rows]):
            model(ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before <= 0.5 and right(model, held_out, wanted) >= 0.95
    assert right(model, held_out[torch.randperm(64)], wanted) < 0.6  # of the sound, and not of the question
