"""The recipe: files, overrides, and every mistake told at once."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora import LoraError
from lora.train import Recipe, load_recipe

NEEDED = {"model": "m", "data": "d.jsonl", "out": "o"}


def test_an_unknown_key_gets_a_suggestion() -> None:
    with pytest.raises(LoraError, match="unknown key 'batchsize'; near names: batch_size"):
        Recipe.of(**NEEDED, batchsize=4)
    with pytest.raises(LoraError, match="unknown key 'drop_out'; near names: dropout"):
        Recipe.of(**NEEDED, drop_out=0.1)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(LoraError) as caught:
        Recipe.of(model="m", r=0, lr="fast", schedule="sawtooth", targets=3, epoch=1, quantize="int4", optimizer="sgd")
    told = str(caught.value)
    assert told.startswith("recipe: 9 mistakes\n")
    for part in (
        "data is missing: Training rows",
        "out is missing",
        "r: got 0; the rank is a whole number of at least 1",
        "lr is 'fast'; it must be a valid number",
        "schedule is 'sawtooth'; it must be 'linear', 'cosine' or 'constant'",
        "targets is 3; it must be",
        "quantize is 'int4'; it must be 'none', 'nf4' or 'int8'",
        "optimizer is 'sgd'; it must be 'adamw', 'adamw_8bit' or 'paged_adamw'",
        "unknown key 'epoch'; near names: epochs",
    ):
        assert part in told


def test_fields_that_contradict_each_other_are_told_together() -> None:
    with pytest.raises(LoraError) as caught:
        Recipe.of(**NEEDED, epochs=1, max_steps=5, warmup_steps=5, dora=True, update="x", offload=True)
    told = (
        "give one",
        "dora: got True beside update='x'",
        "leaves nothing of max_steps=5",
        "set gradient_checkpointing as well",
    )
    for part in told:
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(LoraError, match="lr is"):
        Recipe.of(**NEEDED, lr=value)


@pytest.mark.parametrize("name", ["r.yaml", "r.json"])
def test_a_file_with_flags_over_it(tmp_path: Path, name: str) -> None:
    fields = {**NEEDED, "epochs": 3, "lr": 1e-3, "train": "embed_tokens"}
    (tmp_path / name).write_text(json.dumps(fields, indent="\t" if name.endswith("json") else None))
    assert load_recipe(tmp_path / name) == Recipe.of(**{**fields, "train": ["embed_tokens"]})
    over = load_recipe(tmp_path / name, {"lr": 2e-3, "max_steps": 7})
    assert (over.lr, over.max_steps, over.epochs) == (2e-3, 7, None)  # max_steps takes the place of epochs
    for first, second, update in (("dora", True, "lora"), ("update", "dora", "lora"), ("update", "lora", "dora")):
        written = Recipe.of(**NEEDED, **{first: second}).to_yaml()
        (tmp_path / "which.yaml").write_text(written)
        flag = {"update": update} if first == "dora" else {"dora": update == "dora"}
        assert load_recipe(tmp_path / "which.yaml", flag).adapter().update == update
    assert load_recipe(None, NEEDED) == Recipe.of(**NEEDED)


def test_yaml_writes_exponents_as_people_do(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\ndata: d\nout: o\nlr: 2e-3\ntargets: [q_proj, v_proj]\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.lr, recipe.targets) == (2e-3, ["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "is not valid YAML or JSON"),
        ("- model", "holds list; it must be a mapping"),
        ("", "holds NoneType; it must be a mapping"),
        ("model: m\ndata: d\nout: o\nlr: 1\nlr: 2\n", "key 'lr' is given twice"),
        ("model: m\ndata: d\nout: o\nranks: 3\n", r"r\.yaml: 1 mistake\n  - unknown key 'ranks'"),
    ],
)
def test_broken_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(LoraError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_file() -> None:
    with pytest.raises(LoraError, match=r"there is no file 'gone\.yaml'"):
        load_recipe("gone.yaml")


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "r": st.integers(1, 64),
    "alpha": st.floats(0.1, 1e3),
    "dropout": st.floats(0, 0.99),
    "targets": st.one_of(st.just("all-linear"), st.lists(st.text("abc_", min_size=1), min_size=1, max_size=3)),
    "train": st.lists(st.text("xyz:#é ", min_size=1), max_size=2),
    "lr": st.floats(1e-9, 1.0),
    "schedule": st.sampled_from(["linear", "cosine", "constant"]),
    "rslora": st.booleans(),
    "out": st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
}


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_the_saved_recipe_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]) -> None:
    recipe = Recipe.of(**{**NEEDED, **fields})
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe
