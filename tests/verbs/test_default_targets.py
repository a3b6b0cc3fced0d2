"""targets=None: the query and value projections of each attention, whatever a model calls them."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import lora
from lora import LoraError, LoraWarning
from lora.config import matches
from lora.layers import base_modules, hosts, kind_of
from lora.targets import default_targets

BERT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31,
}  # fmt: skip
T5: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 31}


def picked(model: nn.Module) -> Counter[str]:
    """The last parts of the names, and how many."""
    with pytest.warns(LoraWarning, match="targets: None picked"):
        lora.inject(model, r=2)
    return Counter(name.rpartition(".")[2] for name, _, _ in hosts(model))


MODELS: dict[str, tuple[Any, dict[str, int]]] = {
    "t5, with its cross-attention": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), {"q": 6, "v": 6}),
    "deberta-v2": (lambda: hf.DebertaV2Model(hf.DebertaV2Config(**BERT)), {"query_proj": 2, "value_proj": 2}),
    "deberta": (lambda: hf.DebertaModel(hf.DebertaConfig(**BERT)), {"in_proj": 2}),
    "rwkv": (
        lambda: hf.RwkvModel(hf.RwkvConfig(hidden_size=16, num_hidden_layers=2, vocab_size=31)),
        {"key": 4, "value": 4, "receptance": 4, "output": 2},
    ),
    "phi": (lambda: hf.PhiModel(hf.PhiConfig(**BERT)), {"q_proj": 2, "v_proj": 2, "fc1": 2, "fc2": 2}),
    "bert": (lambda: hf.BertModel(hf.BertConfig(**BERT)), {"query": 2, "value": 2}),
    "gpt2": (lambda: hf.GPT2Model(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31)), {"c_attn": 2}),
    "mpnet": (lambda: hf.MPNetModel(hf.MPNetConfig(**BERT)), {"q": 2, "v": 2}),
    "mamba": (
        lambda: hf.MambaModel(hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=31, state_size=4)),
        {"in_proj": 2},
    ),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_default_targets_of(name: str) -> None:
    build, expected = MODELS[name]
    assert picked(build()) == expected


NAMES = [
    (["a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "mlp.up_proj"], ["q_proj", "v_proj"]),
    (["a.q_proj.linear", "a.k_proj.linear", "a.v_proj.linear", "m.linear"], ["q_proj.linear", "v_proj.linear"]),
    (["a.Wq", "a.Wk", "a.Wv", "a.dense"], ["Wq", "Wv"]),
    (["a.linear_q", "a.linear_k", "a.linear_v"], ["linear_q", "linear_v"]),
    (["a.projection_query", "a.projection_key", "a.projection_value"], ["projection_query", "projection_value"]),
    (["a.q_a_proj", "a.q_b_proj", "a.kv_a_proj_mqa", "a.o_proj"], ["q_a_proj", "q_b_proj", "kv_a_proj_mqa"]),
    (["a.kv_proj", "a.kv_b_proj", "indexer.wq_b", "indexer.wk"], ["kv_proj", "kv_b_proj"]),  # an indexer has no values
    (["a.Wqkv", "m.Wo"], ["Wqkv"]),
    (["a.W_pack", "m.up"], ["W_pack"]),
    (["a.query_key_value", "b.q_proj", "b.v_proj"], ["query_key_value", "q_proj", "v_proj"]),  # two towers
    (["a.key", "a.value", "m.key", "m.value.dense"], ["value"]),
    (["x.in_proj", "x.x_proj", "a.q_proj", "a.v_proj"], ["q_proj", "v_proj"]),  # a hybrid of Mamba and attention
    (["x.in_proj", "x.x_proj"], ["in_proj"]),
    (["a.q", "a.v", "m.v"], ["q", "a.v"]),  # another v, which is no attention's
    (["0.q", "0.k", "0.v", "v_head"], ["q", "v"]),
]  # fmt: skip


@pytest.mark.parametrize(("names", "targets"), NAMES, ids=lambda value: value[0])
def test_default_targets_follow_from_names(names: list[str], targets: list[str]) -> None:
    assert default_targets(names) == targets


@pytest.mark.parametrize("names", [["a.fc1", "a.fc2"], ["v_head"], ["a.query"], []], ids=str)
def test_a_model_without_attention_has_no_default_targets(names: list[str]) -> None:
    with pytest.raises(LoraError, match="this model has none under a known name"):
        default_targets(names)


def shrunk(config: Any) -> Any:
    """At most 4 layers, and as many layer types."""
    for key, value in list(vars(config).items()):
        if isinstance(value, hf.PretrainedConfig):
            shrunk(value)
        elif re.fullmatch(r"(num_(hidden_|encoder_|decoder_)?|n_|encoder_|decoder_)layers?|depth", key):
            setattr(config, key, min(value, 4) if isinstance(value, int) else value)
        elif key.endswith("layer_types") and isinstance(value, list):
            setattr(config, key, [*value[:3], *value[-1:]])
    return config


def built() -> Any:
    """(model_type, the names of the linears of its model on the meta device) for all that can be built."""
    auto = hf.models.auto
    tables = (
        auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.modeling_auto.MODEL_MAPPING,
    )  # fmt: skip
    for name in auto.configuration_auto.CONFIG_MAPPING:
        try:
            config = shrunk(auto.configuration_auto.CONFIG_MAPPING[name]())
            kind = next(table[type(config)] for table in tables if type(config) in table)
            with torch.device("meta"):
                model = (kind[0] if isinstance(kind, tuple) else kind)._from_config(config)
        except Exception:  # of 800 architectures, those that need more than their defaults or other packages
            continue
        found = [(n, kind_of(m)) for n, m in base_modules(model)]
        yield name, [n for n, k in found if k is not None and k.all_linear]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_default_targets_of_every_architecture_are_no_fewer_than_pefts_and_in_each_attention() -> None:
    table = pytest.importorskip("peft.utils.constants").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    seen = set()
    for name, linear in built():
        query = [n for n in linear if re.search(r"(^|[._])(q|query|qkv|Wqkv)(_proj|_lin|$)", n.rpartition(".")[2])]
        values = {n.rpartition(".")[0] for n in linear if re.search(r"(^|_)(v|value)(_proj|_lin|$)", n)}
        try:
            targets = default_targets(linear, name)
        except LoraError:
            assert not [n for n in query if n.rpartition(".")[0] in values], name
            assert name not in table, name
            continue
        seen.add(name)
        own = {n for n in linear if matches(targets, n)}
        assert {n for n in linear if matches(table.get(name), n)} <= own, name
        around = {n.rpartition(".")[0] for n in own}
        assert not [n for n in query if n.rpartition(".")[0] in values - around], name
    assert len(seen) > 400 and len(seen & set(table)) > 25
