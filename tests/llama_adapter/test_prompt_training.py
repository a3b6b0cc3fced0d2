"""Training a LLaMA-Adapter: recomputed layers, compiled code, 16 bits, quantized bases, processes, beside LoRA."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import lora
from lora import llama_adapter
from tiny_decoders import X, adapted, llama, opened, parts


def gradients(model: Any, ids: Tensor = X, **settings: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **settings).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    close = [torch.allclose(found[n], wanted[n], rtol=0, atol=tolerance * float(wanted[n].abs().max())) for n in wanted]
    return found.keys() == wanted.keys() and all(close)


@pytest.fixture
def model() -> Any:
    return adapted(llama()).train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_have_the_same_gradients(model: Any, reentrant: bool) -> None:
    wanted = gradients(model, use_cache=False)
    assert len(wanted) == 4
    if reentrant:
        model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that change with transformers
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert same(gradients(model, use_cache=False), wanted)


def test_prepare_and_the_loss_goes_down() -> None:
    model = lora.prepare(llama_adapter.inject(llama(), layers=2, prompt_length=4)).train()
    assert lora.summary(model).prepared == "checkpointing"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(X, labels=X, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_compiled_whole(model: Any) -> None:
    wanted = gradients(model, use_cache=False)
    logits = model(X, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(X, use_cache=False).logits, logits, atol=1e-5)
    compiled(X, labels=X, use_cache=False).loss.backward()  # beside what is there already
    model.zero_grad()
    compiled(X, labels=X, use_cache=False).loss.backward()
    assert same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, wanted, 1e-4)
    opened(model, seed=5)
    assert torch.allclose(compiled(X, use_cache=False).logits, model(X, use_cache=False).logits, atol=1e-5)
    lora.activate(model, None)
    assert torch.allclose(compiled(X, use_cache=False).logits, model(X, use_cache=False).logits, atol=1e-5)


def test_compiled_whole_over_the_models_own_attention(model: Any) -> None:
    model.set_attn_implementation("eager")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(X, use_cache=False).logits, model(X, use_cache=False).logits, atol=1e-5)


def test_compiled_steps_of_a_generation_read_what_the_first_call_kept(model: Any) -> None:
    from transformers import StaticCache

    model.eval()
    calls: list[int] = []
    model.model.layers[-1].self_attn.k_proj.register_forward_pre_hook(
        lambda _, args: calls.append(1) if args[0].shape[:2] == (1, 5) else None
    )
    wanted = model(X, use_cache=False).logits
    calls.clear()
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        cache = StaticCache(model.config, max_cache_len=16)
        model(X[:, :5], past_key_values=cache)
        for i in range(5, X.shape[1]):
            logits = step(X[:, i : i + 1], past_key_values=cache).logits
            assert torch.allclose(logits[:, 0], wanted[:, i], atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_16_bits_have_no_nan(dtype: torch.dtype, attention: str) -> None:
    model = llama(attn_implementation=attention).to(dtype).train()
    opened(llama_adapter.inject(model, layers=2, prompt_length=5), size=2.0)
    for part in parts(model):
        part.prompts.data *= 300  # far from how they start
    losses = []
    for _ in range(3):
        loss = model(X, labels=X).loss
        loss.backward()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(
        p.grad.isfinite().all() and p.grad.dtype == torch.float32 for part in parts(model) for p in part.parameters()
    )


def test_autocast_over_fp32_weights() -> None:
    model = adapted(llama()).train()
    wanted = model(X).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X, labels=X)
    assert (out.logits.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
    out.loss.backward()
    assert all(p.grad.isfinite().all() for part in parts(model) for p in part.parameters())


# Beside LoRA.


def test_lora_in_the_same_attention_trains_with_the_prompts() -> None:
    model = adapted(llama(), name="prompts")
    lora.inject(model, r=2, targets="all-linear", name="low")
    lora.activate(model, ["prompts", "low"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora." in name)
            if name.endswith(".low.B"):
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    assert {name.split(".lora.")[1].split(".")[0] for name in gradients(model)} == {"prompts", "low"}
    both = model(X).logits
    for alone in ("prompts", "low"):
        lora.activate(model, alone)
        assert not torch.allclose(model(X).logits, both, atol=1e-3)
    # The prompts go through the projections as the model has them, so folding the LoRA adapter in changes nothing.
    lora.activate(model, "low")
    merged = copy.deepcopy(model)
    lora.remove(merged, "prompts")
    lora.merge(merged, unload=True)
    llama_adapter.inject(merged, layers=2, prompt_length=5)
    for own, theirs in zip(parts(merged), parts(model, "prompts"), strict=True):
        own.load_state_dict(theirs.state_dict())
    assert torch.allclose(merged(X).logits, both, atol=1e-4)


def test_a_merged_lora_and_prompts_take_turns() -> None:
    model = adapted(llama(), name="prompts")
    lora.inject(model, r=2, targets=["q_proj"], name="low")
    with pytest.raises(lora.LoraError, match="cannot be merged"):
        lora.activate(model, ["prompts", "low"])
        lora.merge(model)
    lora.activate(model, "low")
    lora.merge(model)
    lora.unmerge(model)
    lora.activate(model, "prompts")
    assert torch.equal(model(X).logits, adapted(llama(), name="prompts")(X).logits)


# Quantized bases.


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base(kind: str, tmp_path: Path) -> None:
    quantized_base = pytest.importorskip("quantized_base")
    model = quantized_base.llama(kind)
    ids = quantized_base.tokens()
    before = model(ids).logits
    llama_adapter.inject(model, layers=1, prompt_length=4)
    fresh = model(ids).logits  # every product of a quantized base is computed by the library while it is adapted
    opened(model)
    twin = llama_adapter.inject(
        quantized_base.dense_twin(copy.deepcopy(model), torch.float32), layers=1, prompt_length=4
    )
    for own, theirs in zip(parts(twin), parts(model), strict=True):
        own.load_state_dict(theirs.state_dict())
    wanted, found = twin(ids).logits, model(ids).logits.float()
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for part in parts(model) for p in part.parameters())
    lora.save(model, tmp_path)
    assert torch.equal(lora.load(quantized_base.llama(kind), tmp_path)(ids).logits, model(ids).logits)
    with lora.disabled(model):
        assert torch.equal(model(ids).logits, fresh)
    lora.remove(model)
    assert torch.equal(model(ids).logits, before)


# Processes.


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = adapted(llama()).train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    ids = X[rank : rank + 1]
    parallel(ids, labels=ids, use_cache=False).loss.backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"{folder}/gradients")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_both_batches(model: Any, tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    assert same(torch.load(tmp_path / "gradients"), gradients(model), 1e-4)
