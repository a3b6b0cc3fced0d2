"""PEFT's files whose modules_to_save are tied in the base: trained apart, or equal."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lora
from conftest import randomize, refused, same_bits, snapshot, tiny_gpt2, tiny_llama
from lora import LoraWarning

BUILD = {"llama": lambda: tiny_llama(tie_word_embeddings=True), "gpt2": tiny_gpt2}
ENDS = {"llama": ["embed_tokens", "lm_head"], "gpt2": ["wte", "lm_head"]}
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
APART = r"\.weight and .*\.weight are tied in this model and were trained apart"


def theirs(kind: str, folder: Path, apart: bool) -> tuple[nn.Module, Path]:
    """PEFT's model over the tied base, its two copies trained apart or not, and its file."""
    model = get_peft_model(
        BUILD[kind](),
        LoraConfig(r=4, target_modules=TARGETS[kind], modules_to_save=ENDS[kind], fan_in_fan_out=kind == "gpt2"),
    )
    randomize(model)
    copies = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    assert len(copies) == 2 and copies[0] is not copies[1]
    if not apart:
        copies[1].data.copy_(copies[0])
    assert torch.equal(*copies) is not apart
    model.save_pretrained(folder)
    return model.eval(), folder


def ends(model: nn.Module) -> tuple[Tensor, Tensor]:
    """What acts as the table and as the head."""
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def close(one: Tensor, other: Tensor) -> None:
    """But for the rounding of a merge."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def untie(model: nn.Module) -> nn.Module:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.mark.parametrize("kind", list(BUILD))
def test_untied_peft_file_lands_in_both_and_says_so(kind: str, ids: Tensor, tmp_path: Path) -> None:
    peft, folder = theirs(kind, tmp_path, apart=True)
    with pytest.warns(LoraWarning, match=APART):
        model = lora.load(BUILD[kind](), folder)
    table, head = ends(model)
    assert table is not head and not torch.equal(table, head)
    torch.testing.assert_close(model(ids).logits, peft(ids).logits)


@pytest.mark.parametrize("kind", list(BUILD))
def test_untied_peft_file_whose_two_are_equal_stays_tied(kind: str, ids: Tensor, tmp_path: Path) -> None:
    peft, folder = theirs(kind, tmp_path, apart=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraWarning)
        model = lora.load(BUILD[kind](), folder, trainable=True)
    table, head = ends(model)
    assert table is head
    torch.testing.assert_close(model(ids).logits, peft(ids).logits)
    acting = model(ids).logits
    lora.merge(model)  # tied weights take a merge of tied copies
    close(model(ids).logits, acting)
    assert ends(model)[0] is ends(model)[1]


@pytest.mark.parametrize("kind", list(BUILD))
def test_untied_peft_file_is_saved_again_with_both(kind: str, ids: Tensor, tmp_path: Path) -> None:
    _, folder = theirs(kind, tmp_path / "peft", apart=True)
    with pytest.warns(LoraWarning, match=APART):
        model = lora.load(BUILD[kind](), folder)
    lora.save(model, tmp_path / "ours")
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert same_bits({key: new[key] for key in old}, old) and new.keys() == old.keys()
    with pytest.warns(LoraWarning, match=APART):
        again = lora.load(BUILD[kind](), tmp_path / "ours")
    assert torch.equal(again(ids).logits, model(ids).logits)
    peft = PeftModel.from_pretrained(BUILD[kind](), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(peft(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", list(BUILD))
def test_untied_peft_file_is_not_merged_into_a_tied_base_and_is_into_an_untied_one(
    kind: str, ids: Tensor, tmp_path: Path
) -> None:
    _, folder = theirs(kind, tmp_path / "peft", apart=True)
    with pytest.warns(LoraWarning, match=APART):
        model = lora.load(BUILD[kind](), folder)
    wanted = model(ids).logits.detach()
    refused(lambda: lora.merge(model), model, r"(embed_tokens|wte)\.weight and lm_head\.weight are tied")

    untied = lora.load(untie(BUILD[kind]()), folder)
    assert torch.equal(untied(ids).logits, wanted)
    before = snapshot(untied)
    lora.merge(untied)
    close(untied(ids).logits, wanted)
    lora.unmerge(untied)
    assert same_bits(snapshot(untied), before)
    lora.merge(untied, unload=True)
    untied.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.tie_word_embeddings is False
    assert torch.equal(again(ids).logits, untied(ids).logits)
    close(again(ids).logits, wanted)


def test_untied_peft_file_is_merged_once_its_base_is_untied_under_it(ids: Tensor, tmp_path: Path) -> None:
    _, folder = theirs("llama", tmp_path, apart=True)
    with pytest.warns(LoraWarning, match=APART):
        model = lora.load(BUILD["llama"](), folder)
    wanted = model(ids).logits.detach()
    lora.activate(model, None)
    untie(model)
    lora.activate(model, "default")
    lora.merge(model)
    close(model(ids).logits, wanted)


def test_untied_peft_file_acts_in_copies_and_beside_others_and_leaves_the_base_tied(
    ids: Tensor, tmp_path: Path
) -> None:
    _, folder = theirs("llama", tmp_path / "peft", apart=True)
    model = randomize(lora.inject(BUILD["llama"](), r=2, targets=["q_proj"], train=ENDS["llama"], name="tied"))
    with pytest.warns(LoraWarning, match=APART):
        lora.load(model, folder)
    wanted = model(ids).logits.detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, wanted)
        refused(lambda: lora.merge(twin), twin, "are tied")  # noqa: B023  (called at once)
    with pytest.warns(LoraWarning, match="save_pretrained: tied, default will not come back"):
        model.save_pretrained(tmp_path / "whole")  # the copies apart, the tied ones once
    held = load_file(tmp_path / "whole" / "model.safetensors")
    assert sum(".lora.default.module." in key for key in held) == 2
    assert sum(".lora.tied.module." in key for key in held) == 1
    lora.activate(model, "tied")
    lora.merge(model)
    lora.unmerge(model)
    lora.remove(model)
    assert ends(model)[0] is ends(model)[1]
    assert torch.equal(model(ids).logits, BUILD["llama"]()(ids).logits)


def test_untied_peft_file_trains_on_with_both_apart(ids: Tensor, tmp_path: Path) -> None:
    _, folder = theirs("llama", tmp_path, apart=True)
    with pytest.warns(LoraWarning, match=APART):
        model: Any = lora.load(BUILD["llama"](), folder, trainable=True)
    before = [end.detach().clone() for end in ends(model)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(ids, labels=ids).loss.backward()
    assert all(end.grad is not None for end in ends(model))
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, ends(model), strict=True))
    assert not torch.equal(*ends(model))


def test_a_refused_untied_peft_file_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    _, folder = theirs("llama", tmp_path, apart=True)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(key for key in tensors if "lora_A" in key))
    save_file(tensors, file)
    model = BUILD["llama"]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraWarning)
        refused(lambda: lora.load(model, folder), model, "missing")


def test_of_three_tied_modules_those_that_a_file_parts_are_parted(tmp_path: Path) -> None:
    """Also where the file has no tensor of the first."""

    def three(tied: bool) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
        if tied:
            model[2].weight = model[3].weight = model[1].weight
        return model

    names = ["1", "2", "3"]
    model = randomize(lora.inject(three(False), r=2, targets=["0"], train=names))
    lora.save(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.1.weight"]
    save_file(tensors, file)
    with pytest.warns(LoraWarning, match=r"base_model\.model\.3\.weight and base_model\.model\.2\.weight are tied"):
        again = lora.load(three(True), tmp_path, check=False)
    for name in ("2", "3"):
        assert torch.equal(again.get_submodule(name).weight, tensors[f"base_model.model.{name}.weight"])
