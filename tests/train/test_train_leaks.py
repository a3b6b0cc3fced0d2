"""Which models can train on packs, by trying: transformers 5.23 says so of none."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import lora
from conftest import tiny_gpt2, tiny_llama
from lora import LoraError
from lora.data.collate import PackingCollator
from lora.train import Recipe, run
from lora.train.leaks import check_packing, collator_for
from tiny_base import save_tiny_base

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
OLD = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
OLD |= {"eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 1, "num_local_experts": 2}
MAMBA = {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}

PACKS = {
    "llama sdpa": hf.LlamaConfig(**SIZES, **HEADS),
    "llama eager": hf.LlamaConfig(**SIZES, **HEADS, attn_implementation="eager"),
    "qwen3": hf.Qwen3Config(**SIZES, **HEADS, head_dim=8),
    "mistral, rows longer than its window": hf.MistralConfig(**SIZES, **HEADS, sliding_window=8),
    "gemma2, the same": hf.Gemma2Config(**SIZES, **HEADS, head_dim=8, sliding_window=8, attn_implementation="eager"),
    "gpt2, learned positions": hf.GPT2Config(**OLD),
    "phi3": hf.Phi3Config(**SIZES, **HEADS),
    "mixtral": hf.MixtralConfig(**SIZES, **HEADS, **EXPERTS),
}
LEAKS = {
    "opt, whose mask takes no positions": hf.OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, pad_token_id=0,
    ),
    "gpt_oss, the same": hf.GptOssConfig(**SIZES, **HEADS, **EXPERTS, sliding_window=8),
    "falcon, the same": hf.FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False
    ),
    "mamba, a state": hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2, a state": hf.Mamba2Config(vocab_size=96, hidden_size=32, num_hidden_layers=2, **MAMBA),
    "recurrent gemma, a state in some layers": hf.RecurrentGemmaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, lru_width=32, attention_window_size=8,
    ),
    "lfm2, convolutions": hf.Lfm2Config(**SIZES, **HEADS, layer_types=["conv", "full_attention"]),
}  # fmt: skip
STRANGE = {
    "bloom takes no positions": hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "openai-gpt takes no use_cache": hf.OpenAIGPTConfig(**OLD),
}


def built(config: Any) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # as they are made, layers hardly change what passes through
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    return model


@pytest.mark.parametrize("name", PACKS)
def test_a_model_that_keeps_packed_rows_apart(name: str) -> None:
    check_packing(built(PACKS[name]))


@pytest.mark.parametrize("name", LEAKS)
def test_a_model_that_lets_packed_rows_see_each_other_is_refused(name: str) -> None:
    with pytest.raises(LoraError, match="row 2 depend on tokens of other rows. Give packing: false"):
        check_packing(built(LEAKS[name]))


@pytest.mark.parametrize("name", STRANGE)
def test_a_model_that_does_not_take_packs_is_refused(name: str) -> None:
    with pytest.raises(LoraError, match="cannot train on packed rows: .* Give packing: false"):
        check_packing(built(STRANGE[name]))


def test_positions_that_run_on_are_found() -> None:
    model: Any = tiny_gpt2()
    table = model.transformer.wpe
    forward = table.forward
    table.forward = lambda ids: forward(torch.arange(ids.shape[1]).expand_as(ids))
    with pytest.raises(LoraError, match="row 2 are .*% from those of the row alone .its positions do not start again"):
        check_packing(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_leaves_an_adapted_model_as_it_was(dtype: torch.dtype) -> None:
    model: Any = tiny_llama(attention_dropout=0.5).to(dtype)
    lora.inject(model, r=4, dropout=0.5, targets=["q_proj", "v_proj"])
    model.train()
    model.model.norm.eval()
    state, seed = {k: x.clone() for k, x in model.state_dict().items()}, torch.get_rng_state()
    check_packing(model)
    assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())
    assert torch.equal(seed, torch.get_rng_state())
    assert model.training and model.model.layers[0].training and not model.model.norm.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_flash_attention_gets_one_flat_row() -> None:
    model: Any = tiny_llama()
    assert not collator_for(model, 3).flat
    model.config._attn_implementation = "flash_attention_2"
    assert collator_for(model, 3).flat


def test_a_wrapper_without_embeddings_is_refused() -> None:
    model: Any = tiny_llama()
    model.model.embed_tokens, model.get_input_embeddings = nn.Embedding(97, 48), lambda: nn.Embedding(97, 48)
    with pytest.raises(LoraError, match="input embeddings are not where it says"):
        check_packing(model)


def test_a_run_tries_its_model_before_it_trains_on_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = PackingCollator.__call__

    def joined(self: PackingCollator, packs: Any) -> dict[str, Any]:
        batch = pack(self, packs)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "count 3", "completion": "0 1 2"}\n' * 8, encoding="utf-8")
    settings = {"packing": True, "max_steps": 1, "batch_size": 1, "max_length": 64, "check": False}
    recipe = Recipe.of(
        model=str(save_tiny_base(tmp_path / "base")), data=str(rows), out=str(tmp_path / "out"), **settings
    )
    monkeypatch.setattr(PackingCollator, "__call__", joined)
    with pytest.raises(LoraError, match="packing: LlamaForCausalLM with sdpa attention cannot train on packed rows"):
        run(recipe)
    monkeypatch.setattr(PackingCollator, "__call__", pack)
    assert run(recipe).metrics["steps"] == 1
