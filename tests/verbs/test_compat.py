"""What people do with a model, done with an adapted one."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
from conftest import MODELS, randomize, same_bits, snapshot, tiny_llama
from lora.layers import hosts


@pytest.fixture
def model() -> nn.Module:
    return randomize(lora.inject(tiny_llama(), r=4, targets=["q_proj", "v_proj", "down_proj"]))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def backward(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(architecture: str, ids: Tensor, backend: str) -> None:
    torch._dynamo.reset()
    build, targets = MODELS[architecture]
    model = randomize(lora.inject(build(), r=4, targets=targets))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    compiled(ids).logits.sum().backward()
    got = gradients(model)
    model.zero_grad()
    model(ids).logits.sum().backward()
    assert got.keys() == gradients(model).keys()
    for name, want in gradients(model).items():
        assert (got[name] - want).norm() <= 1e-4 * want.norm(), name


def test_verbs_see_through_a_compiled_model(model: nn.Module, tmp_path, ids: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    want = compiled(ids).logits
    lora.save(compiled, tmp_path)
    fresh = lora.load(tiny_llama(), tmp_path)
    torch.testing.assert_close(fresh(ids).logits, want)
    with lora.disabled(compiled):
        torch.testing.assert_close(compiled(ids).logits, tiny_llama()(ids).logits)
    lora.merge(compiled)
    torch.testing.assert_close(compiled(ids).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(ids: Tensor, base: torch.dtype) -> None:
    model = randomize(lora.inject(tiny_llama().to(base), r=4, targets=["q_proj", "down_proj"], dropout=0.1)).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    grads = gradients(model)
    assert len(grads) == 12
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() and g.any() for g in grads.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(ids: Tensor, reentrant: bool) -> None:
    model = randomize(lora.inject(tiny_llama(), r=4, targets=["q_proj", "down_proj"], dropout=0.2)).train()
    torch.manual_seed(0)
    plain = backward(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:  # torch's own rule for it: the input of a checkpointed layer must require a gradient
        model.enable_input_require_grads()
    torch.manual_seed(0)
    got = backward(model, ids)
    assert got.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(got[name], plain[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_plain_module(reentrant: bool) -> None:
    net = randomize(lora.inject(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), targets=["0", "2"], r=2))
    x = torch.randn(5, 8, requires_grad=True)
    net(x).sum().backward()
    want = gradients(net)
    net.zero_grad()
    checkpoint(net, x, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(g, want[n]) for n, g in gradients(net).items())


def test_deepcopy_is_independent(model: nn.Module, ids: Tensor) -> None:
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    before = model(ids).logits
    randomize(twin, std=1.0)
    lora.merge(twin)
    assert torch.equal(model(ids).logits, before)
    lora.remove(twin)
    assert same_bits(snapshot(twin), snapshot(tiny_llama()))


def test_pickle_of_a_module_and_torch_save(model: nn.Module, ids: Tensor) -> None:
    for merged in (False, True):
        if merged:
            lora.merge(model)
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(ids).logits, model(ids).logits)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    lora.remove(twin)
    assert same_bits(snapshot(twin), snapshot(tiny_llama()))


def test_state_dict_round_trip(model: nn.Module, ids: Tensor) -> None:
    other = lora.inject(tiny_llama(), r=4, targets=["q_proj", "v_proj", "down_proj"])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_a_base_checkpoint_loads_into_an_adapted_model(model: nn.Module) -> None:
    missing, unexpected = model.load_state_dict(tiny_llama().state_dict(), strict=False)
    assert not unexpected
    assert all(".lora." in key for key in missing)


def test_generate_agrees_with_the_merged_model(model: nn.Module, ids: Tensor) -> None:
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **settings)
    lora.merge(model)
    assert torch.equal(model.generate(ids, **settings), want)


def test_to_dtype_and_back_to_training(model: nn.Module, ids: Tensor) -> None:
    want = model(ids).logits
    model.to(torch.float64)
    assert model(ids).logits.dtype == torch.float64
    torch.testing.assert_close(model(ids).logits.float(), want, rtol=1e-4, atol=1e-5)
    model.bfloat16()
    assert model(ids).logits.dtype == torch.bfloat16
    model.train()
    assert all(h.lora.training for _, h, _ in hosts(model))


def test_to_another_device(model: nn.Module) -> None:
    model.to("meta")
    assert all(p.is_meta for p in model.parameters())


def test_meta_model_then_weights_then_adapter(model: nn.Module, ids: Tensor, tmp_path) -> None:
    lora.save(model, tmp_path)
    with torch.device("meta"):
        late = tiny_llama()
    state = tiny_llama().state_dict()
    for order in ("weights first", "adapter first"):
        late = copy.deepcopy(late).to("meta")
        if order == "adapter first":
            lora.load(late, tmp_path)
        late.load_state_dict(state, assign=True, strict=False)
        late.tie_weights()
        if order == "weights first":
            lora.load(late, tmp_path)
        for name, buffer in tiny_llama().named_buffers():
            late.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
        assert torch.equal(late.eval()(ids).logits, model(ids).logits), order
        lora.remove(late)


def test_transformers_trainer_trains_the_adapter_alone(ids: Tensor, tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    model = lora.inject(tiny_llama(), r=4, targets="all-linear")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(8, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=24, learning_rate=2e-2, per_device_train_batch_size=4,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.4
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


def test_inference_mode_and_no_grad(model: nn.Module, ids: Tensor) -> None:
    want = model(ids).logits
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, want)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


def test_a_merged_layer_runs_the_bare_operation(model: nn.Module) -> None:
    lora.merge(model)
    for _, host, _ in hosts(model):
        assert type(host) is nn.Linear
        assert "forward" not in host.__dict__
    lora.unmerge(model)
    with lora.disabled(model):
        assert all(type(host) is nn.Linear for _, host, _ in hosts(model))
