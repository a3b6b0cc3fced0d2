"""One test for each fault of other tools that concerns our verbs, named after the fault."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import lora
from conftest import randomize, refused, same_bits, snapshot, tiny_bert, tiny_llama
from lora.layers import hosts
from two_kinds import merge as quiet_merge


def peft_model(model: nn.Module, **config: object) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**config))


def test_one_of_several_targets_matches_nothing() -> None:
    assert peft_model(tiny_llama(), target_modules=["q_proj", "v_prj"]) is not None  # there: silent
    model = tiny_llama()
    refused(lambda: lora.inject(model, targets=["q_proj", "v_prj"]), model, r"'v_prj'.*near names.*v_proj")
    refused(lambda: lora.inject(model, targets=r".*\.v_prj"), model, r"v_prj")
    refused(lambda: lora.inject(model, targets=["q_proj"], exclude=["o_prj"]), model, r"exclude.*o_prj")
    refused(lambda: lora.inject(model, targets=["q_proj"], train=["lm_hed"]), model, r"train.*lm_hed.*lm_head")
    refused(lambda: lora.inject(model, targets=["q_proj"], layers=[0, 3]), model, r"layers.*3.*0 to 2")


@pytest.mark.parametrize("which", ["rank_pattern", "alpha_pattern"])
def test_rank_pattern_key_matches_nothing(which: str) -> None:
    assert peft_model(tiny_llama(), target_modules=["q_proj"], **{which: {"k_proj": 4}}) is not None  # there: silent
    model = tiny_llama()
    # k_proj is in the model, but it is no target; and a key that fits is no excuse for one that does not.
    for key in ("k_proj", "q_prj", "layers.7.self_attn.q_proj"):
        pattern = {"q_proj": 2, key: 4}
        refused(lambda p=pattern: lora.inject(model, targets=["q_proj"], **{which: p}), model, rf"{which}.*{key}")


def test_adapter_with_nan_merged_poisons_the_base() -> None:
    model = tiny_llama()
    lora.inject(model, r=4, targets=["q_proj", "v_proj"])
    randomize(model)
    *_, (_, _, last) = hosts(model)
    last["default"].B.data[-1, -1] = torch.nan
    refused(lambda: lora.merge(model), model, "NaN")
    lora.remove(model)
    assert same_bits(snapshot(model), snapshot(tiny_llama()))


def test_bf16_merge_of_a_small_update_loses_most_of_it_silently() -> None:
    model = tiny_llama().to(torch.bfloat16)
    lora.inject(model, r=4, targets=["q_proj", "v_proj"])
    randomize(model, std=1e-2)
    first, *others = [adapters["default"] for _, _, adapters in hosts(model)]
    first.B.data *= 1e-3
    for other in others:
        other.B.data *= 300
    with pytest.warns(lora.LoraWarning, match=r"1 of 6 modules kept less than 99%.*layers\.0\.self_attn\.q_proj"):
        report = lora.merge(model)
    worst = min(report.modules, key=lambda m: m.kept)
    assert worst.kept < 0.9
    assert f"{worst.kept:.2%}" in str(report).splitlines()[2]  # the worst stands first
    assert all(m.kept > 0.99 for m in report.modules if m is not worst)


def test_merge_and_unmerge_drift_in_bf16() -> None:
    model = tiny_llama().to(torch.bfloat16)
    before = snapshot(model)
    lora.inject(model, r=4, targets="all-linear")
    randomize(model, std=0.05)
    weight = "model.layers.0.self_attn.q_proj.weight"
    for _ in range(100):
        quiet_merge(model)
        assert not torch.equal(model.state_dict()[weight], before[weight])
        lora.unmerge(model)
    lora.remove(model)
    assert same_bits(snapshot(model), before)


def test_merged_then_disable_adapter_stays_unmerged(ids: Tensor) -> None:
    model = tiny_llama()
    base = model(ids).logits
    lora.inject(model, r=4, targets="all-linear")
    randomize(model)
    lora.merge(model)
    merged = model(ids).logits
    with lora.disabled(model):
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, merged)
    assert lora.summary(model).merged


def test_tied_embeddings_part_company(tmp_path: Path, ids: Tensor) -> None:
    def tied() -> nn.Module:
        return tiny_llama(tie_word_embeddings=True)

    model = tied()
    refused(lambda: lora.inject(model, targets=["q_proj"], train=["embed_tokens"]), model, "tied to 'lm_head.weight'")
    refused(
        lambda: lora.inject(model, targets=["q_proj"], train=["lm_head"]), model, "tied to 'model.embed_tokens.weight'"
    )
    lora.inject(model, targets=["lm_head"])
    randomize(model)
    refused(lambda: lora.merge(model), model, "tied")
    lora.remove(model)

    lora.inject(model, targets=["q_proj"], train=["embed_tokens", "lm_head"])
    randomize(model)
    copies = [model.model.embed_tokens.lora["default"].module, model.lm_head.lora["default"].module]
    assert copies[0].weight is copies[1].weight
    logits = model(ids).logits
    lora.save(model, tmp_path)
    other = lora.load(tied(), tmp_path, trainable=True)
    assert torch.equal(other(ids).logits, logits)
    copies = [other.model.embed_tokens.lora["default"].module, other.lm_head.lora["default"].module]
    assert copies[0].weight is copies[1].weight
    lora.merge(other, unload=True)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    torch.testing.assert_close(other(ids).logits, logits, rtol=1e-5, atol=1e-6)


def test_inject_into_a_model_in_eval_mode_leaves_dropout_active(ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama().eval()
    lora.inject(model, r=4, targets=["q_proj", "v_proj"], dropout=0.5)
    randomize(model)
    assert not any(m.training for m in model.modules())
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    lora.save(model, tmp_path)
    model.eval()
    lora.load(model, tmp_path, name="second")
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_an_init_that_changes_the_base_is_unloaded_to_other_weights(tmp_path: Path) -> None:
    """PiSSA and its like; plain ones leave W0 alone, and those that do not are refused here by name."""
    model = tiny_llama()
    before = snapshot(model)
    refused(lambda: lora.inject(model, targets=["q_proj"], init="pissa"), model, "^init: got 'pissa'")
    for init in ("gaussian", "kaiming"):
        lora.inject(model, targets=["q_proj"], init=init)
        lora.remove(model)
        assert same_bits(snapshot(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft_model(tiny_llama(), r=4, target_modules=["q_proj"], init_lora_weights="pissa")
        theirs.save_pretrained(tmp_path)
        plain = theirs.unload().state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(plain, before["model.layers.0.self_attn.q_proj.weight"])  # there: the base has changed
    refused(lambda: lora.load(model, tmp_path), model, "init_lora_weights.*pissa")


def test_switching_adapters_under_compile_recompiles(ids: Tensor) -> None:
    model = tiny_bert().requires_grad_(False)
    for name in ("a", "b"):
        lora.inject(model, r=4, targets=["query", "value"], name=name)
    model.requires_grad_(False)
    compiles = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable:
        compiles.append(1)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count)
    for name in ("a", "b"):
        lora.activate(model, name)
        compiled(input_ids=ids)
    warm = len(compiles)
    for name in ("a", "b", "a", "b"):
        lora.activate(model, name)
        compiled(input_ids=ids)
    assert len(compiles) == warm


def test_unknown_keyword_is_ignored() -> None:
    model = tiny_llama()
    refused(lambda: lora.inject(model, targets=["q_proj"], rank=8), model, "rank")
    refused(lambda: lora.inject(model, targets=["q_proj"], lora_alpha=8), model, "alpha")


def test_disabled_adapters_leave_a_trained_bias_behind(ids: Tensor) -> None:
    """PEFT: with bias != "none" a disabled adapter still answers with the trained biases, and so does a removed one."""
    theirs = peft_model(tiny_bert(), target_modules=["query"], bias="lora_only")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("query.base_layer.bias"):
                parameter.add_(1.0)
    base = tiny_bert()(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with theirs.disable_adapter():
            assert not torch.equal(theirs(ids).logits, base)  # there
    for bias in ("lora_only", "all"):
        model = tiny_bert()
        lora.inject(model, targets=["query"], bias=bias)
        randomize(model)
        with lora.disabled(model):
            assert torch.equal(model(ids).logits, base)
        lora.activate(model, None)
        assert torch.equal(model(ids).logits, base)
        lora.remove(model)
        assert same_bits(snapshot(model), snapshot(tiny_bert()))


def test_a_refused_inject_leaves_the_first_adapter_alone() -> None:
    model = tiny_llama()
    lora.inject(model, r=4, targets=["q_proj"], name="a")
    randomize(model)
    refused(lambda: lora.inject(model, targets=["q_proj"], name="a"), model, "already has an adapter 'a'")
    refused(lambda: lora.inject(model, targets=["nothing"], name="b"), model, "nothing")
    refused(lambda: lora.inject(model, targets=["q_proj"], r=0, name="b"), model, "^r: got 0")
    refused(lambda: lora.activate(model, ["a", "c"]), model, "'c'")
    refused(lambda: lora.activate(model, ["a", "a"]), model, "twice")
    refused(lambda: lora.remove(model, "c"), model, "'c'")


def test_a_copy_shares_its_adapter_with_the_original(ids: Tensor) -> None:
    model = tiny_llama()
    lora.inject(model, r=4, targets=["q_proj"])
    randomize(model)
    other = copy.deepcopy(model)
    before = model(ids).logits
    randomize(other, std=1.0)
    lora.remove(other)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(other(ids).logits, tiny_llama()(ids).logits)
