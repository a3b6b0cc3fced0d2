"""Recipes and configs that no one means: one error each, and soon."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lora import LoraError
from lora.train import Recipe, load_recipe
from lora.train.base_facts import facts_of, read_facts
from lora.train.recipe_file import read_yaml, to_yaml

MANY = 1 << 17
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
TEXTS = {
    "deep.yaml": "a: " + "[" * MANY, "deep.json": '{"a":' * MANY, "deep_block.yaml": "- " * MANY,
    "deep_less.json": '{"a":' * 40 + "1" + "}" * 40, "digits.yaml": "r: " + "9" * 5000,
    "digits.json": '{"r": ' + "9" * 5000 + "}",
    "merge.yaml": "a: 1\n<<: {b: 2}\n", "bomb.yaml": BOMB, "tag.yaml": "a: !!python/object/apply:os.system [x]\n",
    "nul.yaml": "model: \0\n", "two.yaml": "a: 1\n---\nb: 2\n", "key.yaml": "? [a]\n: 1\n",
    "large.yaml": "#" * (1 << 19),
    "bytes.yaml": b"\xff\xfe\x00", "keys.yaml": "".join(f"key{i}: 1\n" for i in range(2000)),
    "half.json": '{"model": "\\ud800", "data": "d", "out": "o"}', "nan.json": '{"lr": NaN, "epochs": 1e999}',
    "nul.json": '{"model": "\\u0000", "data": "d", "out": "o"}', "empty.json": "", "word.json": '"a"',
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_deep_inputs_of_a_recipe_are_one_error(tmp_path: Path, name: str) -> None:
    content = TEXTS[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.process_time()
    with pytest.raises(LoraError) as caught:
        load_recipe(tmp_path / name)
    assert time.process_time() - start < 2
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 8000


def test_deep_inputs_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"is a folder; give a YAML or JSON file$"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(LoraError, match=r"such as the recipe\.yaml in it"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{"r": 10**12}, {"epochs": 1e300}, {"r": 10**5000}, {"rank_pattern": {"q": 10**5000}}, {"alpha": 1e300},
     {"lr": 1e300}, {"alpha_pattern": {"q": 1e300}}, {"batch_size": 10**12}, {"max_steps": 10**12},
     {"max_length": 10**12}, {"warmup_steps": 1e300}, {"weight_decay": 1e300}, {"data": "a\0b"}, {"out": "a\0b"},
     {"eval_data": "\0"}],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_deep_inputs_a_number_beyond_use_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(LoraError, match="recipe: 1 mistake") as caught:
        Recipe.of(**{"model": "m", "data": "d", "out": "o", **fields})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "told"),
    [("[" * MANY, "nested too deeply"), ("[]", "holds list"), ("{", "is no config"), ("\0", "is no config"),
     (b"\xff", "is no config"), ('{"hidden_size": ' + "9" * 5000 + "}", "5,000 digits")],
    ids=["deep", "list", "open", "nul", "bytes", "digits"],
)  # fmt: skip
def test_deep_inputs_of_a_base_s_config_are_one_error(tmp_path: Path, content: Any, told: str) -> None:
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LoraError, match=f"^model: .*{told}"):
        read_facts(str(tmp_path))


def test_deep_inputs_a_config_that_says_nothing_is_no_error() -> None:
    for config in ({}, {"hidden_size": "x"}, {"hidden_size": -1, "text_config": 3}, {"hidden_size": 10**300}):
        facts = facts_of(json.loads(json.dumps(config)))
        assert (facts.parameters, facts.positions) == (None, None)


@pytest.mark.parametrize(
    "text", ["1e-4", "no", "~", "0x10", "1:30", "2024-01-01", "<<", "a: b", "", "null", "12", ".5", "é#"]
)
def test_text_stays_text_in_a_written_recipe(text: str) -> None:
    assert read_yaml(to_yaml({"a": text, "b": [text]})) == {"a": text, "b": [text]}


def test_bare_words_mean_what_people_write() -> None:
    assert read_yaml("a: 1e-4\nb: 3\nc: true\nd: ~\ne: no\nf: .inf\ng: [1, x]\nh: 'true'\ni: 1_0") == {
        "a": 1e-4, "b": 3, "c": True, "d": None, "e": "no", "f": float("inf"), "g": [1, "x"], "h": "true", "i": "1_0",
    }  # fmt: skip
