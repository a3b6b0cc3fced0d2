"""Each architecture at tiny size: the base to the bit when fresh, else the paper's formula beside its own attention."""

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lora
from lora import LoraError, llama_adapter
from lora.layers import hosts
from tiny_decoders import X, adapted, bits, opened, parts

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
EXPERTS = {"num_experts_per_tok": 1, "num_local_experts": 2}
OWN = {"head_dim": 12}  # not hidden / heads
MANY = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
MODELS = {
    "llama": hf.LlamaConfig(**SIZES, **HEADS),
    "llama with biases": hf.LlamaConfig(**SIZES, **HEADS, attention_bias=True),
    "mistral, sliding": hf.MistralConfig(**SIZES, **HEADS, **OWN, sliding_window=4),
    "qwen2": hf.Qwen2Config(**SIZES, **HEADS),
    "qwen3": hf.Qwen3Config(**SIZES, **HEADS, **OWN),
    "qwen3 moe": hf.Qwen3MoeConfig(**SIZES, **HEADS, **OWN, **MANY),
    "gemma": hf.GemmaConfig(**SIZES, **HEADS, **OWN),
    "gemma2, sliding, capped scores": hf.Gemma2Config(
        **SIZES, **HEADS, **OWN, sliding_window=4, attn_logit_softcapping=2.0
    ),
    "gemma3, sliding": hf.Gemma3TextConfig(**SIZES, **HEADS, **OWN, sliding_window=4, sliding_window_pattern=2),
    "gpt-oss, sliding, sinks": hf.GptOssConfig(**SIZES, **HEADS, **OWN, **EXPERTS, sliding_window=4),
    "phi": hf.PhiConfig(**SIZES, **HEADS),
    "phi3, one projection": hf.Phi3Config(**SIZES, **HEADS),
    "mixtral": hf.MixtralConfig(**SIZES, **HEADS, **EXPERTS),
    "olmo2": hf.Olmo2Config(**SIZES, **HEADS),
    "granite": hf.GraniteConfig(**SIZES, **HEADS, attention_multiplier=0.5),
    "smollm3, layers without positions": hf.SmolLM3Config(**SIZES, **HEADS, no_rope_layers=[1, 0, 1]),
    "cohere": hf.CohereConfig(**SIZES, **HEADS),
    "glm4, part of a head rotated": hf.Glm4Config(**SIZES, **HEADS, head_dim=8, partial_rotary_factor=0.5),
    "gpt-neox": hf.GPTNeoXConfig(**SIZES, **{k: v for k, v in HEADS.items() if k != "num_key_value_heads"}),
    "starcoder2": hf.Starcoder2Config(**SIZES, **HEADS),
    "gpt2": hf.GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2),
    "llama4, complex rotations": hf.Llama4TextConfig(
        **SIZES, **HEADS, head_dim=8, intermediate_size_mlp=48, num_local_experts=2
    ),
    "deepseek3, latent keys": hf.DeepseekV3Config(
        **SIZES, **{**HEADS, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6,
    ),
    "opt": hf.OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, pad_token_id=0, init_std=0.2,
    ),
}  # fmt: skip


def built(name: str) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(MODELS[name])
    attention = "sdpa" if name == "gpt2" else "eager"  # whose forward does otherwise for "eager"
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("sinks") or parameter.dim() == 1:  # also norms and biases, so that each matters
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def projected(attention: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values (1, key_heads, K, dim) of prompts, by what the attention is made of."""
    if hasattr(attention, "kv_b_proj"):  # one key of the position for all heads, and the others from a latent
        latent, turned = attention.kv_a_proj_with_mqa(prompts).split(
            [attention.kv_lora_rank, attention.qk_rope_head_dim], -1
        )
        both = attention.kv_b_proj(attention.kv_a_layernorm(latent)).view(1, prompts.shape[1], attention.num_heads, -1)
        turned = torch.cat([turned[..., 0::2], turned[..., 1::2]], -1)  # as the queries are laid
        k, v = both.split([attention.qk_nope_head_dim, attention.v_head_dim], -1)
        k = torch.cat([k, turned[:, :, None].expand(*k.shape[:3], -1)], -1)
        return k.transpose(1, 2), v.transpose(1, 2)
    if hasattr(attention, "qkv_proj"):
        heads, own = attention.config.num_attention_heads, attention.num_key_value_heads
        _, k, v = attention.qkv_proj(prompts).split([n * attention.head_dim for n in (heads, own, own)], -1)
    elif hasattr(attention, "c_attn"):
        _, k, v = attention.c_attn(prompts).split(attention.split_size, -1)
    elif hasattr(attention, "query_key_value"):  # three in each head
        fused = attention.query_key_value(prompts)
        _, k, v = fused.view(*fused.shape[:2], -1, 3, attention.head_size).unbind(3)
        k, v = k.flatten(2), v.flatten(2)
    else:
        k, v = attention.k_proj(prompts), attention.v_proj(prompts)
    dim = getattr(attention, "head_dim", None) or attention.head_size
    if hasattr(attention, "k_norm") and attention.k_norm.weight.shape[0] != dim:  # of all heads at once
        k = attention.k_norm(k)
    k, v = (each.view(1, prompts.shape[1], -1, dim) for each in (k, v))
    if hasattr(attention, "qk_norm"):
        k = attention.qk_norm(k)
    if hasattr(attention, "k_norm") and attention.k_norm.weight.shape[0] == dim:
        k = attention.k_norm(k)
    return k.transpose(1, 2), v.transpose(1, 2)


def with_the_formula(model: Any, held: list[Any]) -> Any:
    """The bare model with an attention function that adds the paper's formula for the topmost layers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    first = model.config.num_hidden_layers - len(held)

    def oracle(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        output, weights = sys.modules[type(module).__module__].eager_attention_forward(module, q, k, v, mask, **kwargs)
        if module.layer_idx >= first:
            part = held[module.layer_idx - first]
            pk, pv = (
                p.double().repeat_interleave(q.shape[1] // p.shape[1], 1) for p in projected(module, part.prompts)
            )
            scores = q.double() @ pk.transpose(2, 3) * kwargs["scaling"]
            if kwargs.get("softcap"):
                scores = (scores / kwargs["softcap"]).tanh() * kwargs["softcap"]
            added = part.gate.double().tanh() * (scores.softmax(-1) @ pv)
            output = (output.double() + added.transpose(1, 2)).float()
        return output, weights

    ALL_ATTENTION_FUNCTIONS.register("prompt_oracle", oracle)
    ALL_MASK_ATTENTION_FUNCTIONS.register("prompt_oracle", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation("prompt_oracle")
    return model


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture(name: str) -> None:
    model = built(name)
    bare, before = copy.deepcopy(model), model(X).logits
    torch.manual_seed(1)
    llama_adapter.inject(model, layers=2, prompt_length=5)
    assert torch.equal(bits(model(X).logits), bits(before))
    opened(model)
    logits = model(X).logits
    assert (logits - before).abs().max() > 1e-3
    assert torch.allclose(logits, with_the_formula(bare, parts(model))(X).logits, atol=2e-5)
    with lora.disabled(model):
        assert torch.equal(model(X).logits, before)
    model(X, labels=X).loss.backward()
    assert all(p.grad.abs().sum() > 0 for part in parts(model) for p in (part.prompts, part.gate))
    new = model.generate(X, max_new_tokens=6, do_sample=False, eos_token_id=None)
    whole = X
    for _ in range(6):  # longer than a window, without a cache
        whole = torch.cat([whole, model(whole, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(new, whole)


@pytest.mark.parametrize("name", [n for n in MODELS if "capped" not in n and "sinks" not in n])
def test_sdpa_is_eager(name: str) -> None:
    model = adapted(built(name))
    wanted = model(X).logits
    model.set_attn_implementation("sdpa")
    assert torch.allclose(model(X).logits, wanted, atol=2e-5)


GEMMA3N = {
    "vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4,
}  # fmt: skip


def test_of_a_model_that_sees_the_language_model_alone_has_prompts() -> None:
    text = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sees = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config={**sees, "image_size": 28, "patch_size": 14})
    ).eval()
    before = model(X).logits
    llama_adapter.inject(model, layers=2)
    assert torch.equal(bits(model(X).logits), bits(before))
    names = [name for name, _, _ in hosts(model)]
    assert names == [f"model.language_model.layers.{i}.self_attn" for i in (1, 2)]
    assert not torch.equal(opened(model)(X).logits, before)


def test_an_attention_function_that_would_pass_by_is_refused_when_it_is_asked_for() -> None:
    model = adapted(built("gpt2"))
    model.set_attn_implementation("eager")
    with pytest.raises(LoraError, match="takes a way of its own where the attention is 'eager'"):
        model(X)


REFUSED = {
    "Gemma3nTextAttention, cannot carry prompts: .* may depend on shared_kv_states": lambda: hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(**{**SIZES, "num_hidden_layers": 4}, **HEADS, **GEMMA3N)
    ),
    "is an encoder and a decoder": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1, max_position_embeddings=32)
    ),
    "GPT2Attention takes a way of its own where the attention is 'eager'": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, attn_implementation="eager")
    ),
    "no module of BloomForCausalLM": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_model_whose_attention_cannot_be_reached_is_refused_by_name(words: str) -> None:
    model: nn.Module = REFUSED[words]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(LoraError, match=words):
            llama_adapter.inject(model, layers=1)
