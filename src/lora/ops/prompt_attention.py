"""Zero-initialised, gated attention to learned prompts (LLaMA-Adapter, Zhang et al., 2023, arXiv:2303.16199).

    attention(q) = softmax(q K^T s + mask) V  +  f * softmax(q P_k^T s) P_v        f: a factor for each head, 0 at first

The two softmaxes are separate, so the second term is a cross attention to a few keys beside the first, whoever computes
that: no second pass over the keys of the sequence, and no log-sum-exp of theirs.
"""

import torch
from torch import Tensor
from torch.nn import functional


def add_prompt_attention(
    output: Tensor, query: Tensor, keys: Tensor, values: Tensor, factors: Tensor, *, scaling: float | None = None,
    softcap: float | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """output + f * softmax(q P_k^T s) P_v: every query sees every prompt. Where f is zero, output to the bit.

    Args:
        output: (batch, queries, heads, value_dim), of the attention to the sequence.
        query: (batch, heads, queries, dim), with its rotary position.
        keys, values: (batch or 1, key_heads, prompts, dim or value_dim); heads is a multiple of key_heads.
        factors: f, (batch or 1, heads), fp32. It is folded into the values, of which there are few.
        scaling: s; None is dim ** -0.5. softcap: c of scores c tanh(q P_k^T s / c), where the model has one.
        mask: (batch, prompts), True where a row has that prompt; None where each has all.

    Returns:
        As output, in its dtype. The softmax is computed in fp32 (float64 for float64).
    """
    groups = query.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    keys = keys.to(query.dtype)
    # -f P_v, in fp32 as f is, to be subtracted: x - 0.0 is x also where x is -0.0, which x + 0.0 is not. Where f is 0,
    # whatever the signs, this is 0.0 and not -0.0, which it would be as a product.
    scaled = (0.0 - values * factors[:, :, None, None]).to(query.dtype)
    keys, scaled = keys.expand(len(query), -1, -1, -1), scaled.expand(len(query), -1, -1, -1)
    if mask is not None:
        mask = mask[:, None, None, :]
    if softcap is None:
        added = functional.scaled_dot_product_attention(query, keys, scaled, attn_mask=mask, scale=scaling)
    else:
        scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        added = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype) @ scaled
    return output - added.transpose(1, 2).to(output.dtype)
