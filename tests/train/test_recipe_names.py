"""A recipe in other tools' words: what is taken, what is said, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from lora import LoraError
from lora.train import Recipe, load_recipe
from lora.train.names import KNOWN, understood
from said import said

NEEDED = {"model": "m", "data": "d.jsonl", "out": "o"}
# A name, what stands there, and the fields that it means.
MEANT: list[tuple[str, Any, dict[str, Any]]] = [
    ("learning_rate", "1e-4", {"lr": 1e-4}),
    ("num_train_epochs", 3, {"epochs": 3}),
    ("lora_r", 8, {"r": 8}),
    ("lora_alpha", 16, {"alpha": 16}),
    ("per_device_train_batch_size", 4, {"batch_size": 4}),
    ("gradient_accumulation_steps", 2, {"grad_accum": 2}),
    ("target_modules", ["q_proj"], {"targets": ["q_proj"]}),
    ("lora_target", "all", {"targets": "all-linear"}),
    ("lora_target_linear", True, {"targets": "all-linear"}),
    ("modules_to_save", ["lm_head"], {"train": ["lm_head"]}),
    ("load_in_4bit", "True", {"quantize": "nf4"}),
    ("load_in_8bit", False, {}),
    ("quant_bits", 8, {"quantize": "int8"}),
    ("adapter", "qlora", {"quantize": "nf4"}),
    ("peft_use_dora", True, {"dora": True}),
    ("lr_scheduler_type", "constant_with_warmup", {"schedule": "constant"}),
    ("warmup_ratio", 0.1, {"warmup_steps": 0.1}),
    ("sequence_len", 512, {"max_length": 512}),
    ("val_set_size", 0.02, {"eval_share": 0.02}),
    ("val_set_size", 0, {}),
    ("optimizer", "adamw_bnb_8bit", {"optimizer": "adamw_8bit"}),
    ("optim", "paged_adamw_32bit", {"optimizer": "paged_adamw"}),
    ("torch_dtype", "bfloat16", {"dtype": "bf16"}),
    ("dtype", "float16", {"dtype": "fp16"}),
    ("init_lora_weights", True, {"init": "kaiming"}),
    ("use_gradient_checkpointing", "unsloth", {"gradient_checkpointing": True, "offload": True}),
    ("report_to", "none", {"track": []}),
    ("task_type", "CAUSAL_LM", {"task": "generate"}),
    ("save_steps", 50, {"save_every": 50}),
    ("train_on_inputs", False, {}),
    ("stage", "sft", {}),
]
REFUSED: list[tuple[str, Any, str]] = [
    ("deepspeed", "zero3.json", "one process on one device"),
    ("trust_remote_code", True, "never run"),
    ("neftune_noise_alpha", 5, "there is no noise"),
    ("train_on_inputs", True, "the loss falls on answers"),
    ("resume_from_checkpoint", "out/checkpoint-5", "--resume auto"),
    ("val_set_size", 100, "a number of rows; give the share"),
    ("save_steps", 0.1, "a share of the run; save_every counts steps"),
    ("lr_scheduler_type", "polynomial", "understood: constant_with_warmup, linear, cosine, constant"),
    ("optim", "lion", "understood: adamw_torch"),
    ("quant_bits", 3, "there are 4"),
    ("datasets", [{"path": "a"}, {"path": "b"}], "2 sources; give one"),
    ("init_lora_weights", "pissa", "there are true"),
    ("stage", "dpo", "other trainers"),
    ("report_to", "all", "name them"),
    ("warmup_ratio", 3, "a share of the run"),
    ("fp16", "perhaps", "it must be true or false"),
]


@pytest.mark.parametrize(("name", "value", "fields"), MEANT, ids=[f"{n}={v}" for n, v, _ in MEANT])
def test_another_tool_s_name_is_taken_and_said(name: str, value: Any, fields: dict[str, Any]) -> None:
    with said("names of other tools: " + name):
        recipe = load_recipe(None, {**NEEDED, name: value})
    assert recipe == Recipe.of(**NEEDED, **fields)


@pytest.mark.parametrize(("name", "value", "told"), REFUSED, ids=[f"{n}={str(v)[:20]}" for n, v, _ in REFUSED])
def test_what_means_nothing_here_is_refused_by_name(name: str, value: Any, told: str) -> None:
    with pytest.raises(LoraError, match=f"- {name} (is|lists) .*{told}"):
        load_recipe(None, {**NEEDED, name: value})


def test_a_whole_recipe_of_another_tool() -> None:
    axolotl = {
        "base_model": "m", "datasets": [{"path": "rows.jsonl", "type": "alpaca"}], "output_dir": "o",
        "adapter": "qlora",
        "load_in_4bit": True, "sequence_len": 1024, "sample_packing": True, "micro_batch_size": 2,
        "lora_target_linear": True,
        "optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine", "learning_rate": 0.0002, "bf16": True, "num_epochs": 1,
        "special": 1,
    }  # fmt: skip
    fields, notes = understood(axolotl, Recipe.model_fields)
    assert fields.pop("special") == 1  # neither ours nor known: the recipe says so, with near names
    recipe = Recipe.of(**fields)
    assert (recipe.data, recipe.quantize, recipe.packing, recipe.schedule) == ("rows.jsonl", "nf4", True, "cosine")
    assert len(notes) == len(axolotl) - 1


def test_no_limit_of_steps_is_another_tool_s_word_alone(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    text = "model: m\ndata: d\nout: o\nmax_steps: -1\n"
    file.write_text(text + "num_train_epochs: 2\n")
    with said("max_steps of -1 is no limit there, and left out: epochs set the length"):
        assert (recipe := load_recipe(file)).max_steps is None and recipe.epochs == 2
    file.write_text(text)
    for steps in (0, -1):
        with pytest.raises(LoraError, match=f"max_steps is {steps}; it must be at least 1"):
            load_recipe(None, {**NEEDED, "max_steps": steps})
        typed = {"max_steps": steps, "learning_rate": 1e-4}
        assert understood(typed, Recipe.model_fields, typed=True)[0] == {"max_steps": steps, "lr": 1e-4}
    with pytest.raises(LoraError, match="max_steps is -1; it must be at least 1"):
        load_recipe(file)


def test_what_is_understood_and_refused_is_not_called_otherwise() -> None:
    for given in ({"lr": 1e-4, "learning_rate": 1e-3}, {"deepspeed": "x"}):
        with pytest.raises(LoraError, match="^names of other tools: 1 refused\n"):
            load_recipe(None, {**NEEDED, **given})


def test_one_field_under_two_names_is_one_value() -> None:
    with said("learning_rate is lr here"):
        assert load_recipe(None, {**NEEDED, "lr": 1e-4, "learning_rate": "0.0001"}).lr == 1e-4
    with pytest.raises(LoraError, match=r"learning_rate is 0.001 and lr is 0.0001, and both mean lr: give one"):
        load_recipe(None, {**NEEDED, "learning_rate": 1e-3, "lr": 1e-4})


def test_no_name_of_ours_is_taken_for_another_s() -> None:
    """But where its value tells: those stand in a table of their own."""
    ours = {"dtype", "optimizer", "gradient_checkpointing", "max_steps"}
    assert set(KNOWN) & set(Recipe.model_fields) == ours
    assert understood(dict.fromkeys(ours, "x"), Recipe.model_fields) == (dict.fromkeys(ours, "x"), [])
