"""What is told before anything heavy is imported, and the dry run."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import yaml

from lora.errors import DataError, LoraError
from lora.train import Recipe, base_facts
from lora.train.base import load_config
from lora.train.checks import cheap
from lora.train.defaults import resolved
from lora.train.dry_run import dry_run
from lora.train.recipe import load_recipe
from said import said
from tiny_base import EXAMPLE

Plan = Callable[..., Recipe]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 20)

    def make(**changes: Any) -> Recipe:
        here = {"model": str(EXAMPLE), "data": str(tmp_path / "rows.jsonl"), "out": str(tmp_path / "new" / "out")}
        return Recipe.of(**{**here, **changes})

    return make


def test_a_run_that_can_start_leaves_nothing_behind(plan: Plan, tmp_path: Path) -> None:
    facts, found = cheap(plan())
    assert facts is not None and facts.kind == "llama"
    assert found == ("prompt/completion", 20)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("place", ["under_a_file", "a_file", "proc", "occupied", "the_base", "long"])
def test_unwritable_out(plan: Plan, tmp_path: Path, place: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(EXAMPLE, base, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "adapter_config.json").write_text("{}")
    out, told = {
        "under_a_file": (tmp_path / "rows.jsonl" / "a" / "b", "which is a file|cannot be written"),
        "a_file": (tmp_path / "rows.jsonl", "is a file"), "proc": (Path("/proc/lora"), "cannot be written"),
        "occupied": (tmp_path / "used", "already holds an adapter.*--force"),
        "the_base": (base, "the base's own folder"),
        "long": (tmp_path / ("x" * 300) / "y", "cannot be written: File name too long"),
    }[place]  # fmt: skip
    with pytest.raises(LoraError, match=f"^out: .*({told})"):
        cheap(plan(model=str(base), out=str(out)))
    if place == "occupied":
        cheap(plan(out=str(out)), force=True)


def test_a_disk_that_is_too_small_is_told(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(free[0]))
    free = [1 << 20]  # the adapter of 0.6 M parameters takes 2.3 MB
    with pytest.raises(LoraError, match="out: the adapter takes 2 MiB .* make room"):
        cheap(plan())
    free[0] = 8 << 20
    with said("the adapter with its checkpoints takes up to 23 MiB"):
        cheap(plan())


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"data": "gone.jsonl"}, DataError, "data: 'gone.jsonl' is not there"),
        ({"eval_data": "gone.jsonl"}, DataError, "eval_data: 'gone.jsonl' is not there"),
        ({"model": "./gone"}, LoraError, "model: there is no folder './gone'"),
        ({"model": "a b/c"}, LoraError, "model: 'a b/c' is neither a folder here nor a name on the hub"),
        ({"max_length": 5000}, LoraError, "max_length is 5000, but the model takes 1024"),
        ({"warmup_steps": 3}, LoraError, "warmup_steps is 3, but the run has only 3 steps"),
        ({"targets": ["q_porj"]}, LoraError, "targets: 'q_porj' fits no module of a llama model; near names: q_proj"),
        ({"targets": r".*q_porj"}, LoraError, "targets: the regular expression '.*q_porj' fits no adaptable"),
        ({"targets": "all_linear"}, LoraError, "fits no adaptable .*; near names: all-linear"),
        ({"targets": ["layers.9.self_attn.q_proj"]}, LoraError, r"'layers\.9\.self_attn\.q_proj' fits no module of a "),
        ({"layers": [2, 8]}, LoraError, "layers: no target lies in layer 8 of a llama model of 8 layers"),
        ({"exclude": r".*_proj"}, LoraError, "targets: 'all-linear' fits 56 modules .* leave none of them"),
        ({"rank_pattern": {"q_porj": 4}}, LoraError, "rank_pattern: 'q_porj' fits none of the 56 targets; near names:"),
        ({"samples": 3}, LoraError, "samples=3 needs eval_data or eval_share"),
        ({"samples": 5, "eval_share": None}, LoraError, "samples=5 needs eval_data or eval_share"),
        ({"task": "classify", "max_length": 600}, LoraError, "max_length is 600, but the model takes 512"),
    ],
)
def test_late_errors_come_first(plan: Plan, changes: dict[str, Any], kind: type[LoraError], told: str) -> None:
    with pytest.raises(kind, match=told) as caught:
        cheap(plan(**changes))
    assert caught.value.exit_code == kind.exit_code


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"targets": None}, {"targets": r".*\.(q|v)_proj"}, {"targets": "lm_head"}, {"targets": r"model\..*tokens"},
        {"targets": ["0.mlp.up_proj", "lm_head"]}, {"targets": ["my_own"]}, {"layers": 5, "exclude": ["mlp.up_proj"]},
        {"rank_pattern": {r"layers\.0\..*": 4}, "train": ["lm_head"]},
    ],
)  # fmt: skip
def test_targets_that_fit_are_not_in_the_way(plan: Plan, changes: dict[str, Any]) -> None:
    """`my_own` may be anything: what else a model has is not known from its config."""
    cheap(plan(**changes))


@pytest.mark.parametrize("kind", sorted(base_facts._SEVEN))
def test_the_names_that_are_known_are_those_of_the_model(kind: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64}  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **sizes, pad_token_id=0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    known = base_facts.facts_of(config.to_dict())
    assert sorted(known.linear_names()) == sorted(name for name in linears if name != "lm_head")
    assert dict(model.named_modules()).keys() >= {"lm_head", "model.embed_tokens"}


def test_a_recipe_that_was_written_has_no_samples_of_nothing(plan: Plan) -> None:
    """So one that asks for them, by whatever number, is told from one that a run has left open."""
    assert resolved(plan(), None).recipe.samples == 0 and resolved(plan(eval_share=0.1), None).recipe.samples == 3
    cheap(load_recipe(None, yaml.safe_load(resolved(plan(), None).recipe.to_yaml())))
    text, error = dry_run(plan(samples=3))
    assert str(error).startswith("samples=3 needs")
    text, error = dry_run(plan())
    assert error is None and re.search(r"samples +0 +no rows are held out", text)


@pytest.mark.parametrize("content", ["", "{}", '{"wrong": 1}', "[1", "\n\n"])
def test_late_errors_of_rows_come_first(plan: Plan, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(DataError, match="^data: "):
        cheap(plan(data=str(tmp_path / "bad.jsonl")))


def test_a_dry_run_tells_all(plan: Plan) -> None:
    text, error = dry_run(plan(eval_share=0.1, rslora=True, targets=["q_proj"], epochs=4, template="inst"))
    assert error is None
    for part in (
        "base: llama, 8.0 M parameters", "data: prompt/completion, 20 rows, about 2 of them held out",
        "adapter: lora, scaling 8 / sqrt(16) = 2, 65,536 parameters", "steps: 12 of 8 x 1 rows",
        "[INST] prompt [/INST]", "fifteen times full fine-tuning's",
    ):  # fmt: skip
        assert part in text
    settings = {line.split()[0] for line in text.split("\n\n")[0].splitlines()[2:]}
    unset = {"eval_data", "early_stop", "exclude", "layers", "update", "dora", "max_steps"}
    assert settings >= set(Recipe.model_fields) - unset - {"prompt_length"}  # of the other method


def test_a_dry_run_of_what_cannot_be_reached_says_what_it_means(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text, error = dry_run(plan(model="some-org/some-model", quantize="nf4"))
    assert error is None
    assert "base: cannot be reached from here" in text and "quantize" in text
    text, error = dry_run(plan(data="gone.jsonl", out="/proc/x"))
    assert "steps" not in text.split("\n\n")[1] and "all-linear" in text
    assert str(error).startswith("out: '/proc/x' cannot be written")


@pytest.mark.parametrize("name", ["examples/tiny-lama-8m", "tiny-lama-8m"])
def test_a_misspelled_folder_is_told_at_once(plan: Plan, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(base_facts, "_json_on_hub", lambda *_: None)
    monkeypatch.chdir(EXAMPLE.parent.parent if "/" in name else EXAMPLE.parent)
    near = name.replace("lama", "llama")
    for call in (lambda: cheap(plan(model=name)), lambda: load_config(name)):
        with pytest.raises(LoraError, match=f"model: there is no folder '{name}'; near names: {near}"):
            call()
    error = dry_run(plan(model=name))[1]
    assert error is not None and "there is no folder" in str(error)
    monkeypatch.setattr(base_facts, "_json_on_hub", lambda *_: {"model_type": "llama"})
    assert cheap(plan(model=name))[0] is not None  # a model of this name is on the hub


def test_a_classifier_s_default_length_is_what_its_tokenizer_takes(plan: Plan) -> None:
    facts = base_facts.read_facts(str(EXAMPLE))
    assert resolved(plan(), facts).recipe.max_length == 1024
    found = resolved(plan(task="classify"), facts)
    assert found.recipe.max_length == 512
    assert any(str(choice) == "max_length 512: all that the model's tokenizer takes" for choice in found.choices)
