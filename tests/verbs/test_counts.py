"""Published parameter counts, on the meta device, and what an injection costs."""

import time

import pytest
import torch
from torch import nn

import lora


def on_meta(kind: str, **settings: object) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**settings)
    name = {"Llama": "LlamaForCausalLM", "Roberta": "RobertaForSequenceClassification"}[kind]
    with torch.device("meta"):
        return getattr(transformers, name)(config)


LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.mark.parametrize(
    ("kind", "settings", "r", "targets", "count"),
    [
        ("Llama", LLAMA_70B, 4, ["q_proj", "k_proj", "v_proj"], 11_141_120),
        ("Llama", LLAMA2_7B, 8, ["q_proj", "v_proj"], 4_194_304),
        ("Roberta", {}, 8, ["query", "value"], 294_912),
    ],
    ids=["Llama-3.1-70B", "Llama-2-7B", "RoBERTa-base"],
)
def test_published_counts(kind: str, settings: dict, r: int, targets: list[str], count: int) -> None:
    model = on_meta(kind, **settings)
    lora.inject(model, r=r, targets=targets)
    assert lora.summary(model).trainable == count


def test_injecting_into_the_70b_is_fast_and_allocates_nothing_but_a_and_b() -> None:
    model = on_meta("Llama", **LLAMA_70B)
    before = {id(p) for p in model.parameters()}
    start = time.process_time()
    lora.inject(model, r=4, targets=["q_proj", "k_proj", "v_proj"])
    assert time.process_time() - start < 10
    fresh = [(n, p) for n, p in model.named_parameters() if id(p) not in before]
    assert len(fresh) == 80 * 3 * 2
    assert all(n.endswith((".A", ".B")) and p.is_meta for n, p in fresh)
    assert not list(model.buffers()) or all(b.is_meta for b in model.buffers() if b.numel() > 1000)


def test_on_real_memory_nothing_is_allocated_but_a_and_b() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Allocations(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (
                torch.ops.aten.empty.memory_format,
                torch.ops.aten.clone.default,
                torch.ops.aten._to_copy.default,
            ):
                out = func(*args, **(kwargs or {}))
                type(self).total += out.nbytes
                return out
            return func(*args, **(kwargs or {}))

    net = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    with Allocations():
        lora.inject(net, r=4, targets=["0", "1"])
    assert Allocations.total == 2 * 2 * 4 * 256 * 4
