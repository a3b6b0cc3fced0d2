"""Models of which accelerate keeps layers elsewhere: A and B are real where the layer runs, and stay there."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lora
from conftest import randomize, same_bits, snapshot, tiny_gpt2, tiny_llama
from lora import LoraError
from lora.layers import hosts

CPU = torch.device("cpu")
BUILD = {"llama": tiny_llama, "gpt2": tiny_gpt2}
TARGETS = {"llama": ["q_proj", "v_proj", "embed_tokens"], "gpt2": ["c_attn", "wte"]}


def all_on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=CPU)


def all_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder / "disk"), execution_device=CPU)


def some_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    """By a device_map: all but the first layer's block here, that one on the disk."""
    names = [name for name, module in model.named_modules() if name and not list(module.children())]
    chosen = {name: "disk" if ".0." in name or "wte" in name or "embed_tokens" in name else "cpu" for name in names}
    if hasattr(model, "transformer"):  # its tied head goes with the table
        chosen["lm_head"] = "disk"
    return accelerate.dispatch_model(model, chosen, main_device="cpu", offload_dir=str(folder / "some"))


WAYS = [all_on_cpu, all_on_disk, some_on_disk]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}), ("llama", {"dora": True}), ("llama", {"dropout": 0.3}), ("gpt2", {"bias": "lora_only"})
]  # fmt: skip


def adapted(model: nn.Module, kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(4)
    return lora.inject(model, r=4, targets=TARGETS[kind], **settings)


def parts(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora." in name}


def offloaded(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.is_meta}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_offloaded_inject_trains_to_the_same_bits_as_without_offload(
    way: Callable[[nn.Module, Path], nn.Module], kind: str, settings: dict[str, Any], ids: Tensor, tmp_path: Path
) -> None:
    plain, model = BUILD[kind](), way(BUILD[kind](), tmp_path)
    away = offloaded(model)
    assert away
    for each in (plain, model):
        adapted(each, kind, **settings).train()
    assert offloaded(model) == away  # and none of A and B
    assert same_bits(dict(parts(model)), dict(parts(plain)))
    losses: list[list[float]] = []
    for each in (plain, model):
        torch.manual_seed(7)
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.2)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = each(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert same_bits(dict(parts(model)), dict(parts(plain)))
    assert offloaded(model) == away


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_offloaded_inject_loads_generates_and_saves_as_without_offload(
    way: Any, kind: str, settings: dict[str, Any], ids: Tensor, tmp_path: Path
) -> None:
    plain = randomize(adapted(BUILD[kind](), kind, **settings))
    lora.save(plain, tmp_path / "plain")
    model = lora.load(way(BUILD[kind](), tmp_path), tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        keywords: Any = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **keywords), plain.generate(ids, **keywords))
    lora.save(model, tmp_path / "again")
    files = [(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "again")]
    assert same_bits(*map(load_file, files))
    again = lora.load(BUILD[kind](), tmp_path / "again")
    assert torch.equal(again(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_inject_is_switched_and_removed_and_the_hooks_stay(way: Any, ids: Tensor, tmp_path: Path) -> None:
    model = way(tiny_llama(), tmp_path)
    modules = dict(model.named_modules())
    hooks = {name: module.__dict__.get("_hf_hook") for name, module in modules.items()}
    classes = {name: type(module) for name, module in modules.items()}
    away, base = offloaded(model), tiny_llama()(ids).logits
    randomize(adapted(model, "llama"))
    acting = model(ids).logits
    assert not torch.equal(acting, base)
    with lora.disabled(model):
        assert torch.equal(model(ids).logits, base)
    lora.activate(model, None)
    assert torch.equal(model(ids).logits, base)
    lora.activate(model, "default")
    assert torch.equal(model(ids).logits, acting)
    lora.remove(model)
    assert torch.equal(model(ids).logits, base)
    assert dict(model.named_modules()) == modules and {n: type(m) for n, m in modules.items()} == classes
    assert {name: module.__dict__.get("_hf_hook") for name, module in modules.items()} == hooks
    assert offloaded(model) == away and all(p.requires_grad for p in model.parameters())
    remove_hook_from_submodules(model)
    if way is all_on_cpu:  # accelerate gives back what it took itself
        assert same_bits(snapshot(model), snapshot(tiny_llama()))
    assert torch.equal(tiny_llama()(ids).logits, base)


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_inject_does_not_merge_what_is_on_the_meta_device(way: Any, ids: Tensor, tmp_path: Path) -> None:
    model = randomize(adapted(way(tiny_llama(), tmp_path), "llama"))
    before = model(ids).logits
    with pytest.raises(LoraError, match=r"the weight of '.*' is on the meta device; load it, then merge"):
        lora.merge(model)
    assert torch.equal(model(ids).logits, before)


def test_offloaded_inject_says_in_the_summary_where_a_layer_runs() -> None:
    model = adapted(all_on_cpu(tiny_llama(), Path()), "llama")
    assert "on cpu" in str(lora.summary(model)) and "meta" not in str(lora.summary(model))


@pytest.mark.parametrize("settings", [{"train": ["lm_head"]}, {"train": ["layers.1"]}, {"bias": "all"}])
def test_offloaded_inject_refuses_a_copy_that_would_have_no_values(settings: dict[str, Any], tmp_path: Path) -> None:
    build = tiny_gpt2 if "bias" in settings else tiny_llama
    targets = ["c_attn"] if "bias" in settings else ["q_proj"]
    lora.save(randomize(lora.inject(build(), r=2, targets=targets, **settings)), tmp_path)
    model = all_on_cpu(build(), tmp_path)
    refused_meta(lambda: lora.inject(model, r=2, targets=targets, **settings), model)
    refused_meta(lambda: lora.load(model, tmp_path), model)


def refused_meta(verb: Callable[[], object], model: nn.Module) -> None:
    state = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(LoraError, match=r"is offloaded by accelerate, so that a copy of it.*keep it on a device"):
        verb()
    assert not list(hosts(model))
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == state


def test_offloaded_inject_takes_whole_modules_that_are_not_offloaded(ids: Tensor, tmp_path: Path) -> None:
    plain, model = tiny_llama(), some_on_disk(tiny_llama(), tmp_path)
    for each in (plain, model):
        torch.manual_seed(2)
        randomize(lora.inject(each, r=2, targets=["q_proj"], train=["lm_head", "layers.2"]))
    assert torch.equal(model(ids).logits, plain(ids).logits)
    lora.save(model, tmp_path / "a")
    assert torch.equal(lora.load(tiny_llama(), tmp_path / "a")(ids).logits, plain(ids).logits)


def test_offloaded_inject_by_a_device_map_of_from_pretrained(ids: Tensor, tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    names = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(3)),
    ]
    chosen = {name: "disk" if name == "model.layers.0" else "cpu" for name in names}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=chosen, offload_folder=str(tmp_path / "disk")
    )
    assert offloaded(model) and all(name.startswith("model.layers.0.") for name in offloaded(model))
    for each in (plain, model):
        torch.manual_seed(0)
        randomize(lora.inject(each, r=4, targets="all-linear", train=["embed_tokens", "lm_head"]))
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.warns(lora.LoraWarning, match="save_pretrained: default will not come back"):
        model.save_pretrained(tmp_path / "again")  # what is offloaded is written as well
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert same_bits(snapshot(base), snapshot(tiny_llama(tie_word_embeddings=True)))


def test_offloaded_inject_into_what_accelerate_offloads_as_one_is_refused(tmp_path: Path) -> None:
    model = accelerate.cpu_offload(tiny_llama(), execution_device=CPU, preload_module_classes=["LlamaAttention"])
    with pytest.raises(LoraError, match=r"which accelerate offloads as one.*without preload_module_classes"):
        lora.inject(model, r=2, targets=["q_proj"])
    assert not list(hosts(model))
    lora.inject(model, r=2, targets=["down_proj"])


def test_offloaded_inject_twice_and_in_a_copy(ids: Tensor, tmp_path: Path) -> None:
    plain, model = tiny_llama(), all_on_cpu(tiny_llama(), tmp_path)
    for each in (plain, model):
        randomize(adapted(each, "llama"))
        randomize(adapted(each, "llama", name="b", dora=True), seed=3)
        lora.activate(each, ["default", "b"])
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(copy.deepcopy(model)(ids).logits, plain(ids).logits)


def test_an_adapter_that_came_before_the_offload_says_in_which_order(ids: Tensor, tmp_path: Path) -> None:
    model = all_on_cpu(adapted(tiny_llama(), "llama"), tmp_path)
    with pytest.raises(LoraError, match="A and B are on the meta device.*do that first and inject then"):
        model(ids)
    with pytest.raises(LoraError, match="is on the meta device and has no values"):
        lora.save(model, tmp_path / "a")
