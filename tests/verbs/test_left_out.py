"""What an adapter leaves out although a user would expect it: new heads, new vocabulary rows, experts, a wrong name."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lora
from conftest import randomize, tiny_bert, tiny_gpt2, tiny_llama
from lora import LoraError
from lora.layers.left_out import fresh_modules
from said import said

SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97,
}  # fmt: skip


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_untrained_head_is_named_with_the_argument_to_give(tmp_path: Path) -> None:
    model = hf.LlamaForSequenceClassification.from_pretrained(saved(tiny_llama(), tmp_path))
    with said("score of LlamaForSequenceClassification hold fresh values"):
        lora.inject(model, targets=["q_proj"])
    lora.remove(model)
    with said("give train=['score']"):
        lora.inject(model, targets=["q_proj"])
    lora.remove(model)
    with said():
        lora.inject(model, targets=["q_proj"], train=["score"])


def test_untrained_head_that_is_named_comes_back_with_the_adapter(tmp_path: Path, ids: Tensor) -> None:
    base, folder = saved(tiny_llama(), tmp_path / "base"), tmp_path / "adapter"
    model = hf.LlamaForSequenceClassification.from_pretrained(base).eval()
    lora.save(randomize(lora.inject(model, targets=["q_proj"], train=["score"])), folder)
    other = lora.load(hf.LlamaForSequenceClassification.from_pretrained(base).eval(), folder)
    assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("kind", "fresh"),
    [
        (hf.BertForSequenceClassification, ["bert.pooler", "classifier"]),
        (hf.BertForTokenClassification, ["classifier"]),
        (hf.BertForQuestionAnswering, ["qa_outputs"]),
        (hf.BertForMultipleChoice, ["bert.pooler", "classifier"]),
        (hf.BertForMaskedLM, []),
    ],
)
def test_untrained_head_of_each_task(kind: Any, fresh: list[str], tmp_path: Path) -> None:
    settings = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    base = saved(hf.BertForMaskedLM(hf.BertConfig(**settings)), tmp_path)
    model = kind.from_pretrained(base)
    assert fresh_modules(model) == fresh
    with said(*["hold fresh values"] * bool(fresh)):
        lora.inject(model, targets=["query"])


def test_a_head_of_another_size_than_the_checkpoints_is_an_untrained_head(tmp_path: Path) -> None:
    base = saved(tiny_bert(), tmp_path)
    assert fresh_modules(hf.BertForSequenceClassification.from_pretrained(base)) == []
    model = hf.BertForSequenceClassification.from_pretrained(base, num_labels=5, ignore_mismatched_sizes=True)
    assert fresh_modules(model) == ["classifier"]


def test_a_head_that_a_user_has_put_there_is_an_untrained_head(tmp_path: Path) -> None:
    model = hf.LlamaForCausalLM.from_pretrained(saved(tiny_llama(), tmp_path), dtype=torch.bfloat16).float()
    assert fresh_modules(model) == []
    model.lm_head = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 97))
    assert fresh_modules(model) == ["lm_head"]


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert, tiny_gpt2])
def test_a_model_of_no_checkpoint_has_no_untrained_head(build: Any) -> None:
    with said():
        lora.inject(build(), targets="all-linear")


@pytest.mark.parametrize("tied", [True, False])
def test_new_vocabulary_rows_are_named_until_the_model_is_saved(tied: bool, tmp_path: Path) -> None:
    model = hf.LlamaForCausalLM.from_pretrained(saved(tiny_llama(tie_word_embeddings=tied), tmp_path))
    model.resize_token_embeddings(90)
    assert fresh_modules(model) == []  # fewer rows are no new ones
    model.resize_token_embeddings(101)
    with said("give train=['norm', 'model.embed_tokens', 'lm_head']"):
        lora.inject(model, targets=["q_proj"], train=["norm"])
    lora.remove(model)
    with said():
        lora.inject(model, targets=["q_proj"], train=["model.embed_tokens", "lm_head"])
    lora.remove(model)
    assert fresh_modules(hf.LlamaForCausalLM.from_pretrained(saved(model, tmp_path))) == []


EXPERTS = [
    (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL)), r"MixtralExperts (2 modules), 88 % of the parameters"),
    (
        lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SMALL, moe_intermediate_size=40, num_experts=8)),
        "Qwen3MoeExperts (2 modules), 79 % of the parameters",
    ),
    (
        lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SMALL, num_local_experts=4, head_dim=8)),
        "GptOssExperts (2 modules), 83 %",
    ),
]


@pytest.mark.parametrize(("build", "words"), EXPERTS)
def test_experts_left_out_are_named_with_their_share(build: Any, words: str) -> None:
    model = build()
    with said(words):
        lora.inject(model, targets="all-linear")
    lora.remove(model)
    with said():
        lora.inject(model, targets=["q_proj"])
    lora.remove(model)
    with said():
        lora.inject(model, targets="all-linear", exclude=["experts"])


def test_experts_left_out_are_no_convolutions_and_no_tokens() -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Linear(4, 4))
    net.token = nn.Parameter(torch.zeros(1, 1, 512))
    with said():
        lora.inject(net, targets="all-linear")


def test_false_quantised_a_wrong_name_is_told_without_a_word_of_quantizers() -> None:
    for targets in (["q_prj"], "q_prj", [".*"], ["self_attn"], ["norm"]):
        with pytest.raises(LoraError) as caught:
            lora.inject(tiny_llama(), targets=targets)
        assert "quantized by" not in str(caught.value)
    resnet = hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(LoraError) as caught:
        lora.inject(resnet)
    assert "quantized by" not in str(caught.value)


def test_empty_name_a_parameter_is_called_one_and_its_module_named() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.fc = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    model = nn.ModuleDict({"table": Table()})
    words = "'table.gain' is a parameter, and only modules can be named: it belongs to the Table 'table'"
    for settings in (
        {"targets": ["gain"]},
        {"targets": ["fc"], "train": ["gain"]},
        {"targets": ["fc"], "exclude": ["gain"]},
    ):
        with pytest.raises(LoraError, match=words):
            lora.inject(model, **settings)
    with pytest.raises(LoraError, match="it belongs to the Table itself"):
        lora.inject(model.table, targets=["fc"], train=["gain"])
    with pytest.raises(LoraError, match=r"train: 'gian' fits no module; there is: fc$"):
        lora.inject(model.table, targets=["fc"], train=["gian"])
