"""PEFT as oracle: with the same A and B, the same logits and gradients in fp32."""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import MODELS, randomize
from lora.layers import hosts


def pair(build, targets: list[str], ours: dict, theirs: dict) -> tuple[nn.Module, nn.Module]:
    """The same model adapted by us and by PEFT, with the same random A and B (and biases)."""
    base = build()
    mine = randomize(lora.inject(copy.deepcopy(base), targets=targets, **ours), std=0.05)
    config = peft.LoraConfig(target_modules=targets, **theirs)
    other = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, _, adapters in hosts(mine):
            layer = other.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(adapters["default"].A)
            layer.lora_B["default"].weight.copy_(adapters["default"].B)
            if adapters["default"].bias is not None:
                layer.base_layer.bias.copy_(adapters["default"].bias)
    return mine, other


def close(mine: Tensor, theirs: Tensor) -> bool:
    return ((mine - theirs).norm() / theirs.norm()).item() <= 1e-6


SETTINGS = {
    "plain": ({"r": 4, "alpha": 8}, {"r": 4, "lora_alpha": 8}),
    "rslora": ({"r": 4, "alpha": 8, "rslora": True}, {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "biases": ({"r": 2, "alpha": 3, "bias": "lora_only"}, {"r": 2, "lora_alpha": 3, "bias": "lora_only"}),
}


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_logits_and_gradients(architecture: str, setting: str, ids: Tensor) -> None:
    build, targets = MODELS[architecture]
    mine, other = pair(build, targets, *SETTINGS[setting])
    got, want = mine(ids).logits, other(ids).logits
    assert close(got, want)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(0))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    mine_grads: list[Tensor] = []
    their_grads: list[Tensor] = []
    for name, _, adapters in hosts(mine):
        layer, part = other.base_model.model.get_submodule(name), adapters["default"]
        pairs = [(part.A, layer.lora_A["default"].weight), (part.B, layer.lora_B["default"].weight)]
        pairs += [] if part.bias is None else [(part.bias, layer.base_layer.bias)]
        for p, q in pairs:
            assert ((p.grad - q.grad).norm() / q.grad.norm()).item() < 1e-5, name
            mine_grads.append(p.grad.flatten())
            their_grads.append(q.grad.flatten())
    assert len(mine_grads) >= 8
    assert close(torch.cat(mine_grads), torch.cat(their_grads))


def test_rank_and_alpha_patterns(ids: Tensor) -> None:
    build, targets = MODELS["llama"]
    patterns = {"rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 7}, "alpha_pattern": {"down_proj": 5}}
    mine, other = pair(build, targets, {"r": 4, "alpha": 8, **patterns}, {"r": 4, "lora_alpha": 8, **patterns})
    assert close(mine(ids).logits, other(ids).logits)


def test_dropout_is_applied_to_the_same_input() -> None:
    """One linear, so that both draw one mask from the same seed."""
    base = nn.Sequential(nn.Linear(64, 32))
    mine = randomize(lora.inject(copy.deepcopy(base), targets=["0"], r=4, alpha=8, dropout=0.3)).train()
    other = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=8, lora_dropout=0.3)
    ).train()
    layer = other.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(mine[0].lora["default"].A)
        layer.lora_B["default"].weight.copy_(mine[0].lora["default"].B)
    x = torch.randn(16, 64)
    torch.manual_seed(5)
    got = mine(x)
    torch.manual_seed(5)
    assert close(got, other(x))


def test_merged_weights(architecture: str) -> None:
    build, targets = MODELS[architecture]
    mine, other = pair(build, targets, *SETTINGS["plain"])
    lora.merge(mine, unload=True)
    theirs = other.merge_and_unload().state_dict()
    ours = mine.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(close(ours[k], theirs[k]) for k in ours if theirs[k].is_floating_point() and theirs[k].any())
