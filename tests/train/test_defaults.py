"""The defaults of a run and their reasons."""

from typing import Any

import pytest

from lora import LoraError
from lora.train import Recipe
from lora.train.base_facts import BaseFacts, facts_of
from lora.train.defaults import doubts, held_out, rate, resolved, total_steps

LLAMA_8B = facts_of(
    {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
)  # fmt: skip


def recipe(**fields: Any) -> Recipe:
    return Recipe.of(**{"model": "m", "data": "d", "out": "o", **fields})


def test_what_a_config_tells() -> None:
    assert abs(LLAMA_8B.parameters - 8_030_261_248) < 1e-4 * 8e9  # the norms are left out
    assert LLAMA_8B.adapter_parameters(8, ["q_proj", "k_proj", "v_proj"]) == 4_718_592
    seventy = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    seventy = facts_of({"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, **seventy})
    assert seventy.adapter_parameters(4, ["q_proj", "k_proj", "v_proj"]) == 11_141_120
    assert LLAMA_8B.adapter_parameters(8, ["c_attn"]) is None
    bert = {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    assert abs(facts_of({**bert, "intermediate_size": 3072, "vocab_size": 30522}).parameters - 109e6) < 2e6


def test_every_default_has_its_reason_and_what_is_set_stays() -> None:
    told = resolved(recipe(eval_share=0.1), LLAMA_8B, 8000)
    by_field = {choice.field: choice for choice in told.choices}
    plan = told.recipe
    assert (plan.r, plan.alpha, plan.targets, plan.epochs, plan.max_length) == (16, 32, "all-linear", 1, 2048)
    assert (plan.lr, plan.warmup_steps, plan.save_every, plan.eval_every) == (2e-4, 30, 50, 1000)
    assert "ten times full fine-tuning's, some 2e-05 for 8.0 B parameters" in by_field["lr"].reason
    assert str(told).count("\n") == len(by_field) - 1 and all(choice.reason for choice in told.choices)
    assert resolved(plan, LLAMA_8B, 8000).choices == ()  # asked again it adds nothing
    fixed = {"r": 4, "alpha": 8.0, "targets": ["q_proj"], "lr": 1e-3, "warmup_steps": 5.0, "epochs": 2.0}
    fixed |= {"max_length": 64, "save_every": 7, "batch_size": 8}
    assert resolved(recipe(**fixed), LLAMA_8B, 8000).recipe.model_dump(include=set(fixed)) == fixed
    assert {c.field for c in resolved(recipe(**fixed), LLAMA_8B, 8000).choices} == set()


def test_what_the_length_of_the_run_decides_waits_for_it() -> None:
    first = resolved(recipe(), LLAMA_8B).recipe
    assert (first.max_length, first.lr, first.warmup_steps) == (2048, None, None)
    assert resolved(first, LLAMA_8B, 800).recipe.lr == 3e-4
    assert resolved(recipe(max_steps=1000), None).recipe.lr == 2e-4  # a size that is not known is taken for 8 B


def test_the_rate_falls_with_the_size_and_is_higher_in_short_runs() -> None:
    sizes = [10**6, 10**7, 10**8, 10**9, 8 * 10**9, 7 * 10**10]
    rates = [rate(size, 1000)[0] for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert (rates[-2], rates[-1]) == (2e-4, 1.2e-4)  # QLoRA's, by the papers: 2e-4 at 7 B, 1e-4 at 65 B
    assert rate(8 * 10**9, 100)[0] == pytest.approx(1.5 * rates[-2])


def test_one_step_trains() -> None:
    """Transformers' warm-up has a rate of 0 at its first step, which here would be all."""
    plan = resolved(recipe(), LLAMA_8B, 6).recipe
    assert total_steps(plan, 6) == 1
    assert (plan.warmup_steps, plan.save_every) == (0, 1)
    assert resolved(recipe(warmup_steps=0.5), LLAMA_8B, 6).recipe.warmup_steps == 0


def test_a_share_of_warm_up_is_one_of_the_steps() -> None:
    assert resolved(recipe(warmup_steps=0.1, max_steps=50), None).recipe.warmup_steps == 5
    with pytest.raises(LoraError, match="warmup_steps is 3, but the run has only 3 steps"):
        resolved(recipe(warmup_steps=3), None, 24)
    with pytest.raises(LoraError, match="max_length is 4096, but the model takes 128 tokens"):
        resolved(recipe(max_length=4096), BaseFacts("x", positions=128))


def test_the_scale_of_rslora_is_that_of_lora() -> None:
    assert recipe(rslora=True).adapter().scaling("q") == recipe().adapter().scaling("q") == 2


def test_rows_held_out() -> None:
    assert [held_out(recipe(eval_share=0.02), rows) for rows in (2, 30, 5000)] == [1, 1, 100]
    assert held_out(recipe(), 5) == 0
    with pytest.raises(LoraError, match="eval_share: there is 1 row"):
        held_out(recipe(eval_share=0.02), 1)


def test_doubts_are_said() -> None:
    assert doubts(recipe(), 1000, 1000) == []
    small, large = doubts(recipe(batch_size=64, grad_accum=4), 1001, 1000)
    assert "1,001 trained tokens" in small and "larger r" in small
    assert "256 rows" in large
