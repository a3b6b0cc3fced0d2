"""Decoders of a few thousand parameters, and the LLaMA-Adapter of the paper computed apart, in float64."""

import math
from typing import Any

import torch
from torch import Tensor, nn

import lora
from lora import llama_adapter

VOCABULARY = 61
X = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(7))


def llama(**changes: Any) -> Any:
    """A Llama of 3 layers and 4 heads, of which two share a key."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "initializer_range": 0.25,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def parts(model: nn.Module, name: str = "default") -> list[Any]:
    from lora.layers import hosts

    return [adapters[name] for _, _, adapters in hosts(model) if name in adapters]


def opened(model: Any, seed: int = 1, name: str = "default", size: float = 0.5) -> Any:
    """The same model with gates that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in parts(model, name):
            part.gate.copy_(torch.randn(part.gate.shape, generator=generator) * size)
    return model


def adapted(model: Any, seed: int = 1, name: str = "default", **settings: Any) -> Any:
    """A model with prompts whose gates are open."""
    torch.manual_seed(seed)
    llama_adapter.inject(model, name=name, **{"layers": 2, "prompt_length": 5, **settings})
    return opened(model, seed, name)


def rotated(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Rotary position of x (batch, heads, length, dim)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.cat([positions[:, None].double() * frequencies] * 2, -1)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angle.cos() + turned * angle.sin()


def published(model: Any, ids: Tensor) -> Tensor:
    """The logits of a Llama with one adapter by the paper's formula, in float64 from the model's parameters."""
    config, weights = model.config, {n: p.double() for n, p in model.named_parameters()}
    heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    groups = heads // config.num_key_value_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, dim).transpose(1, 2)

    positions = torch.arange(ids.shape[1])
    causal = torch.full((ids.shape[1], ids.shape[1]), -math.inf, dtype=torch.float64).triu(1)
    x = weights["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        w = {k: weights[f"{at}.self_attn.{k}_proj.weight"] for k in "qkvo"}
        normed = norm(x, f"{at}.input_layernorm")
        q, k, v = (split(normed @ w[name].T) for name in "qkv")
        q, k = rotated(q, positions), rotated(k, positions)
        k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
        y = (q @ k.transpose(2, 3) / math.sqrt(dim) + causal).softmax(-1) @ v
        if (prompts := weights.get(f"{at}.self_attn.lora.default.prompts")) is not None:
            gate = weights[f"{at}.self_attn.lora.default.gate"].view(1, heads, 1, 1).tanh()
            pk, pv = (split(prompts @ w[name].T).repeat_interleave(groups, 1) for name in "kv")
            y = y + gate * ((q @ pk.transpose(2, 3) / math.sqrt(dim)).softmax(-1) @ pv)
        x = x + y.transpose(1, 2).flatten(2) @ w["o"].T
        normed = norm(x, f"{at}.post_attention_layernorm")
        mlp = {k: weights[f"{at}.mlp.{k}_proj.weight"] for k in ("gate", "up", "down")}
        x = x + (torch.nn.functional.silu(normed @ mlp["gate"].T) * (normed @ mlp["up"].T)) @ mlp["down"].T
    return norm(x, "model.norm") @ weights["lm_head.weight"].T


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def bits(x: Tensor) -> Tensor:
    """The bits of a tensor: -0.0 is not 0.0."""
    return x.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def without(model: Any, ids: Tensor) -> Tensor:
    with lora.disabled(model), torch.no_grad():
        return model(ids).logits
