"""Modules inside the model that torch wrapped, each by itself: names are those of the model without wrappers."""

import contextlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import lora
from conftest import randomize, same_bits, snapshot, tiny_llama, unchanged
from lora import LoraError, LoraWarning
from lora.layers import base_modules, hosts
from lora.layers.host import submodule

MARKS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def both(module: nn.Module) -> Any:
    return compiled(checkpoint_wrapper(module))


def data_parallel(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of this one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrap_layers(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layers: Any = model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = wrap(layer)
    return model


def wrap_linears(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Each q_proj, that is the host itself, and the head."""
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.q_proj = wrap(layer.self_attn.q_proj)
    model.lm_head = wrap(model.lm_head)
    return model


def adapted(model: nn.Module, **changes: Any) -> nn.Module:
    settings = {
        "r": 4,
        "targets": ["q_proj", "v_proj"],
        "layers": [0, 1],
        "rank_pattern": {r"model.layers.0.self_attn.q_proj": 2},
        "train": ["model.layers.2"],
    } | changes
    torch.manual_seed(5)
    return randomize(lora.inject(model, **settings))


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


WRAPPERS = [compiled, checkpoint_wrapper, both]
PLACES = [wrap_layers, wrap_linears]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("late", [False, True])
def test_an_adapter_has_the_names_and_the_values_of_the_model_without_wrappers(
    wrap: Any, place: Any, late: bool, ids: Tensor, tmp_path: Path
) -> None:
    plain = adapted(tiny_llama())
    wanted = plain(ids).logits
    lora.save(plain, tmp_path / "plain")
    model = place(adapted(tiny_llama()), wrap) if late else adapted(place(tiny_llama(), wrap))
    assert [name for name, _, _ in hosts(model)] == [name for name, _, _ in hosts(plain)]
    assert str(lora.summary(model)) == str(lora.summary(plain))
    assert close(model(ids).logits, wanted)
    lora.save(model, tmp_path / "wrapped")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "wrapped")]
    assert same_bits(*files)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("plain", "wrapped")]
    assert configs[0] == configs[1]
    again = lora.load(place(tiny_llama(), wrap), tmp_path / "plain")
    assert close(again(ids).logits, wanted)
    assert torch.equal(lora.load(tiny_llama(), tmp_path / "wrapped")(ids).logits, wanted)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("place", PLACES)
def test_peft_reads_what_a_wrapped_model_saved(wrap: Any, place: Any, ids: Tensor, tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted(place(tiny_llama(), wrap), train=["lm_head"], layers=None)
    lora.save(model, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    assert close(theirs(ids).logits, model(ids).logits)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("between", [False, True])
def test_verbs_go_through_wrappers_and_leave_the_model_as_it_was(
    wrap: Any, place: Any, between: bool, ids: Tensor
) -> None:
    """Merged and back to the bit; what was frozen before is frozen after, also where the wrapper came in between."""
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    if not between:
        place(model, wrap)
    base, values = model(ids).logits.detach(), snapshot(model)
    adapted(model)
    if between:
        place(model, wrap)
    acting = model(ids).logits.detach()
    lora.merge(model)
    assert close(model(ids).logits, acting)
    lora.unmerge(model)
    with lora.disabled(model):
        assert close(model(ids).logits, base)
    lora.activate(model, None)
    assert close(model(ids).logits, base)
    lora.activate(model, "default")
    assert close(model(ids).logits, acting)
    lora.remove(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert between or same_bits(snapshot(model), values)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("place", PLACES)
def test_a_wrapped_model_trains_as_the_plain_one(wrap: Any, place: Any, ids: Tensor) -> None:
    gradients = []
    for model in (adapted(tiny_llama()), place(adapted(tiny_llama()), wrap), adapted(place(tiny_llama(), wrap))):
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for own in gradients[1:]:
        assert len(own) == len(gradients[0])
        for one, other in zip(own, gradients[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_is_wrapped_inside_a_module_trained_whole_has_plain_names(ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[2].mlp = compiled(model.model.layers[2].mlp)
    adapted(model)
    copy = next(host for name, host, _ in hosts(model) if name == "model.layers.2").lora["default"].module
    assert any("_orig_mod" in name for name, _ in copy.named_parameters())
    copy.self_attn = checkpoint_wrapper(copy.self_attn)  # as who wraps all of a kind does, in the copy as well
    wanted = model(ids).logits.detach()
    lora.save(model, tmp_path)
    assert not any(mark in key for key in load_file(tmp_path / "adapter_model.safetensors") for mark in MARKS)
    assert close(lora.load(tiny_llama(), tmp_path)(ids).logits, wanted)
    base = lora.merge(model)
    assert close(model(ids).logits, wanted) and "model.layers.2" in str(base)
    lora.unmerge(model)
    assert close(model(ids).logits, wanted)


def test_in_a_group_of_processes_what_came_inside_a_wrapper_first_is_saved_with_plain_names(
    alone: None, ids: Tensor, tmp_path: Path
) -> None:
    model = adapted(tiny_llama())
    wanted = model(ids).logits.detach()
    model.model.layers[0] = data_parallel(model.model.layers[0])
    assert "model.layers.0.self_attn.q_proj" in dict(base_modules(model))
    assert close(model(ids).logits, wanted)
    lora.save(model, tmp_path)
    assert torch.equal(lora.load(tiny_llama(), tmp_path)(ids).logits, wanted)
    lora.merge(model)
    assert close(model(ids).logits, wanted)
    lora.remove(model)
    assert close(model(ids).logits, tiny_llama()(ids).logits)


def test_parameters_that_a_data_parallel_module_inside_would_not_sync_are_refused(alone: None, tmp_path: Path) -> None:
    lora.save(adapted(tiny_llama()), tmp_path)
    model = tiny_llama()
    model.model.layers[1] = data_parallel(model.model.layers[1])
    for verb in (lambda: adapted(model), lambda: lora.load(model, tmp_path)):
        with unchanged(model), pytest.raises(LoraError, match="DistributedDataParallel would not sync new parameters"):
            verb()


def test_a_child_that_the_user_called_module_keeps_its_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    model = nn.Sequential(OrderedDict(one=Own(), module=nn.Sequential(nn.Linear(6, 6))))
    lora.inject(model, r=2, targets=["one.module", "module.0"])
    assert [name for name, _, _ in hosts(model)] == ["one.module", "module.0"]


def test_a_module_is_found_by_the_name_that_the_walk_gives_it() -> None:
    model = compiled(wrap_linears(wrap_layers(tiny_llama(), both), checkpoint_wrapper))
    plain = dict(tiny_llama().named_modules())
    found = dict(base_modules(model))
    assert found.keys() == plain.keys()
    assert all(submodule(model, name) is module for name, module in found.items())
    assert [type(m) for m in found.values()] == [type(m) for m in plain.values()]


def test_prepare_finds_a_wrapped_head_and_wrapped_layers(ids: Tensor) -> None:
    model = wrap_linears(tiny_llama().to(torch.bfloat16), checkpoint_wrapper)
    lora.prepare(model, head_dtype=torch.float32)
    lora.inject(model, r=2, targets="all-linear")
    assert not any("lm_head" in name for name, _, _ in hosts(model))
    assert "lm_head in float32" in lora.summary(model).prepared
    assert model(ids).logits.dtype == torch.float32


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_head_is_known_for_one_to_a_file_of_a_resized_vocabulary(wrap: Any, tmp_path: Path) -> None:
    lora.save(adapted(tiny_llama(), train=[]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.weight": torch.ones(101, 48)}, file, {"format": "pt"})
    model = wrap_linears(tiny_llama(), wrap)
    with unchanged(model), pytest.raises(LoraError, match=r"model.resize_token_embeddings\(101\) first"):
        lora.load(model, tmp_path)


@pytest.mark.parametrize("rows", [90, 105])
def test_new_rows_of_a_wrapped_table_and_head_are_told_of_and_fewer_rows_are_not(rows: int, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(rows)
    model.lm_head, model.model.embed_tokens = map(checkpoint_wrapper, (model.lm_head, model.model.embed_tokens))
    told = r"train: model\.embed_tokens, lm_head of LlamaForCausalLM hold fresh values"
    with pytest.warns(LoraWarning, match=told) if rows > 97 else contextlib.nullcontext():
        lora.inject(model, r=2, targets=["q_proj"])
