"""A LLaMA-Adapter on a card: to the bit when fresh, near fp32 when not, 16 bits, NF4, compiled generation."""

import copy
from typing import Any

import pytest
import torch

import lora
from lora import llama_adapter
from test_gpu_quantized import quantize
from tiny_decoders import X, adapted, bits, llama, opened, parts

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
IDS = X.repeat(2, 8)  # 4 rows of 72 tokens


@pytest.fixture
def ids() -> torch.Tensor:
    return IDS.cuda()


def gradients(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return torch.cat([p.grad.float().flatten().cpu() for part in parts(model) for p in (part.gate, part.prompts)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_fresh_adapter_changes_no_bit(ids: torch.Tensor, dtype: torch.dtype, attention: str) -> None:
    model = llama(**SIZES, attn_implementation=attention).to("cuda", dtype)
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(bits(model(ids).logits), bits(before))  # the base itself repeats
        llama_adapter.inject(model, layers=3, prompt_length=10)
        assert torch.equal(bits(model(ids).logits), bits(before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_16_bits_are_near_the_float64_of_the_same_weights(
    ids: torch.Tensor, dtype: torch.dtype, attention: str
) -> None:
    model = adapted(llama(**SIZES, attn_implementation=attention).to("cuda", dtype), prompt_length=10)
    exact = copy.deepcopy(model).double().cpu()
    wanted = exact(IDS).logits
    error = (model(ids).logits.double().cpu() - wanted).norm() / wanted.norm()
    assert error < 0.02
    found, exact_gradient = gradients(model, ids), gradients(exact, IDS)
    assert found.isfinite().all()
    assert (found - exact_gradient).norm() < 0.05 * exact_gradient.norm()


def test_fp16_trains_without_nan(ids: torch.Tensor) -> None:
    model = llama_adapter.inject(llama(**SIZES).to("cuda", torch.float16).train(), prompt_length=10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    scaler, losses = torch.amp.GradScaler(), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0] - 0.2


def test_nf4_is_near_its_dense_twin(ids: torch.Tensor) -> None:
    model = quantize(llama(**SIZES), "nf4")
    opened(llama_adapter.inject(model, prompt_length=10))
    found = gradients(model, ids)
    assert found.isfinite().all() and found.abs().sum() > 0
    with lora.disabled(model), torch.no_grad():
        bare = model(ids).logits
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, bare)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_that_without_a_cache(ids: torch.Tensor, cache: str) -> None:
    """A static cache has transformers compile the steps."""
    model = adapted(llama(**SIZES).cuda(), prompt_length=10)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    wanted = model.generate(ids, use_cache=False, **settings)
    found = model.generate(ids, **settings, **({"cache_implementation": "static"} if cache == "static" else {}))
    assert torch.equal(found, wanted)


def test_compiled_training_is_the_eager_one(ids: torch.Tensor) -> None:
    model = adapted(llama(**SIZES).cuda(), prompt_length=10).train()
    wanted = gradients(model, ids)
    model.zero_grad()
    torch.compile(model, fullgraph=True)(ids, labels=ids, use_cache=False).loss.backward()
    found = torch.cat([p.grad.flatten().cpu() for part in parts(model) for p in (part.gate, part.prompts)])
    assert (found - wanted).norm() < 1e-3 * wanted.norm()
