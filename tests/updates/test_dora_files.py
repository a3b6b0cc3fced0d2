"""Files of DoRA and of tables, through PEFT's own save and load, in both directions."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora
from conftest import refused, tiny_bert, tiny_gpt2, tiny_llama
from dora_oracle import error, fill
from lora.files.description import describe
from lora.layers import hosts

CASES: dict[str, tuple[Any, list[str]]] = {
    "linear": (tiny_llama, ["q_proj", "down_proj"]),
    "conv1d": (tiny_gpt2, ["c_attn"]),
    "bert's tables": (tiny_bert, ["word_embeddings", "position_embeddings", "token_type_embeddings", "query"]),
    "gpt2's tables": (tiny_gpt2, ["wpe", "c_attn"]),
    "untied table": (tiny_llama, ["embed_tokens", "q_proj"]),
}


def tensors_of(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("case", list(CASES))
def test_pefts_files_act_here_as_there(
    case: str, rslora: bool, dora: bool, ids: Tensor, tmp_path: Path
) -> None:  # fmt: skip
    build, targets = CASES[case]
    leaf = targets[-1]
    config = peft.LoraConfig(
        target_modules=targets, r=4, lora_alpha=6, use_dora=dora, use_rslora=rslora,
        rank_pattern={leaf: 3}, alpha_pattern={leaf: 5},
    )  # fmt: skip
    base = build()
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    theirs.save_pretrained(tmp_path)  # adds copies of a targeted table, as save_embedding_layers="auto" has it
    mine = lora.load(copy.deepcopy(base), tmp_path)
    assert {update.name for _, _, a in hosts(mine) for update in a.terms} == {"dora" if dora else "lora"}
    assert error(mine(ids).logits, theirs.eval()(ids).logits.double()) < 1e-5


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("case", list(CASES))
def test_our_files_act_in_peft_and_here_again(
    case: str, rslora: bool, dora: bool, ids: Tensor, tmp_path: Path
) -> None:  # fmt: skip
    build, targets = CASES[case]
    patterns = {"rank_pattern": {targets[-1]: 3}, "alpha_pattern": {targets[-1]: 5}}
    mine = fill(lora.inject(build(), targets=targets, r=4, alpha=6, dora=dora, rslora=rslora, **patterns), std=0.1)
    lora.save(mine, tmp_path)
    want = mine(ids).logits
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    assert error(theirs(ids).logits, want.detach().double()) < 1e-5
    assert torch.equal(lora.load(build(), tmp_path)(ids).logits, want)
    described = describe(tmp_path)
    assert described.parameters == sum(p.numel() for p in mine.parameters() if p.requires_grad)
    assert ("DoRA" in str(described)) == dora and not described.damaged


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lora.save(fill(lora.inject(tiny_llama(), targets=["q_proj"], r=4, dora=True)), tmp_path)
    return tmp_path


def test_a_file_without_a_magnitude_is_refused_by_name(saved: Path) -> None:
    tensors = load_file(tensors_of(saved))
    tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector")
    save_file(tensors, tensors_of(saved))
    model = tiny_llama()
    refused(lambda: lora.load(model, saved), model, r"missing: .*layers\.1\.self_attn\.q_proj\.lora_magnitude_vector")


@pytest.mark.parametrize(("dora", "words"), [(False, "unexpected: .*magnitude"), (True, "missing: .*magnitude")])
def test_settings_that_tell_of_another_update_than_the_tensors_are_refused(
    dora: bool, words: str, tmp_path: Path
) -> None:  # fmt: skip
    lora.save(lora.inject(tiny_llama(), targets=["q_proj"], dora=not dora), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": dora}))
    model: nn.Module = tiny_llama()
    refused(lambda: lora.load(model, tmp_path, check=False), model, words)


def test_inspect_lists_the_magnitudes(saved: Path) -> None:
    text = str(describe(saved))
    assert "settings: r 4, alpha 8, dropout 0.0, DoRA" in text
    assert "model.layers.*.self_attn.q_proj.lora_magnitude_vector" in text and "144" in text
