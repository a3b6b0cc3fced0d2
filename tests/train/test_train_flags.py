"""`lora train`: every field of LoraConfig is a flag, and what is typed there reaches inject."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lora
from lora import LoraConfig, LoraError
from lora.commands import app
from lora.commands.flags import parsed
from lora.config import SETTINGS
from lora.train import Recipe, load_recipe
from lora.train import adapted as adapted_module
from lora.train import job as job_module

TYPED: dict[str, tuple[list[str], Any]] = {
    "r": (["--r", "4"], 4),
    "targets": (["--targets", "q_proj,v_proj"], ["q_proj", "v_proj"]),
    "alpha": (["--alpha", "5.5"], 5.5),
    "dropout": (["--dropout", "0.1"], 0.1),
    "bias": (["--bias", "lora_only"], "lora_only"),
    "init": (["--init", "kaiming"], "kaiming"),
    "rslora": (["--rslora", "--alpha", "32"], True),
    "exclude": (["--exclude", r".*layers\.0\..*"], r".*layers\.0\..*"),
    "layers": (["--layers", "0,2"], [0, 2]),
    "rank_pattern": (["--rank-pattern", r"down_proj=16,\.\d{1,2}.*q=4"], {"down_proj": 16, r"\.\d{1,2}.*q": 4}),
    "alpha_pattern": (["--alpha-pattern", "o_proj=2.5"], {"o_proj": 2.5}),
    "train": (["--train", "norm,lm_head"], ["norm", "lm_head"]),
    "update": (["--update", "mine"], "mine"),
    "dora": (["--dora"], True),
}  # fmt: skip

DEFAULTS = {"r": 16, "targets": "all-linear", "alpha": 32}


def injected(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> LoraConfig:
    """What the trainer gives to lora.inject."""
    given: list[LoraConfig] = []
    monkeypatch.setattr(adapted_module, "load_base", lambda *_: object())
    monkeypatch.setattr(lora, "inject", lambda model, config: given.append(config))
    monkeypatch.setattr(lora, "prepare", lambda model, checkpointing: model)
    adapted_module.adapted(recipe)
    return given[0]


@pytest.mark.parametrize("name", list(SETTINGS))
def test_what_is_typed_reaches_inject(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans: list[Recipe] = []

    def run(plan: Recipe, **_: Any) -> None:
        plans.append(plan)
        raise LoraError("enough")

    monkeypatch.setattr(job_module, "run", run)
    flags, value = TYPED[name]
    done = CliRunner().invoke(app, ["train", "--model", "m", "--data", "d", "--out", "o", *flags])
    assert str(done.exception) == "enough", done.output
    expected = LoraConfig(**{**DEFAULTS, name: value})
    assert injected(plans[0], monkeypatch) == expected
    (tmp_path / "recipe.yaml").write_text(plans[0].to_yaml())  # what lies beside the adapter runs again
    assert injected(load_recipe(tmp_path / "recipe.yaml"), monkeypatch) == expected


def test_nothing_typed_is_a_run_s_own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert injected(Recipe.of(model="m", data="d", out="o"), monkeypatch) == LoraConfig(**DEFAULTS)


@pytest.mark.parametrize("text", ["", "q_proj", "=4", "q_proj=", "a=1,b"])
def test_a_pattern_that_is_none_says_how_to_write_it(text: str) -> None:
    with pytest.raises(LoraError, match=r"alpha_pattern: got .*; write --alpha-pattern NAME=NUMBER"):
        parsed("alpha_pattern", text)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank_pattern", {"q": "x"}), ("rank_pattern", {"q": 0}), ("layers", ["-1"]), ("layers", []), ("exclude", "("),
     ("init", "pissa"), ("bias", "some"), ("targets", []), ("targets", ""), ("dropout", 1.0), ("update", "")],
)  # fmt: skip
def test_a_wrong_value_names_its_flag(name: str, value: Any) -> None:
    with pytest.raises(LoraError, match=rf"recipe: 1 mistake\n  - {name}"):
        Recipe.of(model="m", data="d", out="o", **{name: value})
