"""`lora train --method llama-adapter`, and the commands on what it leaves."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora import LoraError, LoraWarning
from lora.cli import main
from lora.train import Recipe, run
from lora.train.estimate import estimate
from tiny_base import load_example_tokenizer, save_tiny_base
from tiny_run import ROWS, same

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def recipe_of(base: Path, folder: Path, **changes: Any) -> Recipe:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    fields = {
        "model": str(base), "data": str(rows), "out": str(folder / "out"), "method": "llama-adapter", "max_steps": 12,
        "batch_size": 4, "lr": 5e-2, "dtype": "fp32", "save_every": 4, "samples": 0, "prompt_length": 4,
    }  # fmt: skip
    return Recipe.of(**{**fields, **changes})


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    recipe = recipe_of(base, tmp_path_factory.mktemp("run"))
    run(recipe)
    return recipe, Path(recipe.out)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return int(exit_.value.code or 0), printed.out, printed.err

    return call


def test_a_run_learns_and_its_adapter_loads(trained: tuple[Recipe, Path], base: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, out = trained
    record = json.loads((out / "run.json").read_text())
    assert record["metrics"]["trainable_parameters"] == 2 * (4 * 32 + 4)
    assert {line["name"]: line["verdict"] for line in record["outcome"]["lines"]}["read back"] == "ok"
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert losses[-1] < losses[0]
    model = lora.load(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out)
    assert "2  " in str(lora.summary(model)) and "prompts" in str(lora.summary(model))


def test_what_it_leaves_says_what_was_trained(trained: tuple[Recipe, Path]) -> None:
    _, out = trained
    words = "LLaMA-Adapter, 4 prompts in the top 2 layers, a gate for each head"
    assert words in (out / "report.md").read_text()
    card = (out / "README.md").read_text()
    assert (
        words in card
        and "A LLaMA-Adapter for" in card
        and "cannot be merged" in card
        and "peft" not in card.lower()[:200]
    )
    written = (out / "recipe.yaml").read_text()
    assert "method: llama-adapter" in written and "\nr:" not in written and "targets" not in written
    from lora.train.recipe import load_recipe

    again = load_recipe(out / "recipe.yaml")
    assert (again.method, again.prompt_length, again.lr) == ("llama-adapter", 4, 5e-2)


def test_a_run_that_was_cut_goes_on_to_the_bit(trained: tuple[Recipe, Path], base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, tmp_path)
    short = recipe.model_copy(update={"out": str(tmp_path / "out")})
    with pytest.warns(LoraWarning, match="resume: from"):
        run(short, resume=str(_checkpoint(trained[1])))
    assert same(short.out, trained[1])
    other = recipe_of(base, tmp_path, prompt_length=5, out=str(tmp_path / "other"))
    with pytest.raises(LoraError, match="prompt_length was 4 and is 5"):
        run(other, resume=str(_checkpoint(trained[1])))


def _checkpoint(out: Path) -> Path:
    return next(folder for folder in sorted((out / "checkpoints").glob("**/step-*")) if folder.is_dir())


def test_the_commands_answer_with_it_and_merge_refuses(
    trained: tuple[Recipe, Path], base: Path, cli: Cli, tmp_path: Path
) -> None:
    recipe, out = trained
    asked = ("--max-new-tokens", "4", "--prompt", "count 3")
    code, plain, _ = cli("generate", base, *asked)
    assert code == 0
    code, adapted, error = cli("generate", base, "--adapter", out, *asked)
    assert code == 0 and adapted != plain, error
    code, text, error = cli(
        "eval", base, "--adapter", out, "--data", recipe.data, "--limit", "3", "--max-new-tokens", "4"
    )
    assert code == 0, error
    code, text, error = cli("inspect", out)
    assert code == 0 and "4 prompts in the top 2 layers" in text, error
    code, _, error = cli("inspect", out, "--norms")
    assert code == 2 and "no low-rank update" in error
    code, _, error = cli("merge", base, out, tmp_path / "merged")
    assert code == 2 and "cannot be merged" in error and not (tmp_path / "merged").exists()
    code, text, error = cli("check", out, "--model", base, "--data", recipe.data)
    assert code in (0, 6) and "read back: ok" in text + error


def test_a_dry_run_says_what_would_train(base: Path, tmp_path: Path, cli: Cli) -> None:
    recipe = recipe_of(base, tmp_path)
    code, text, error = cli(
        "train", "--model", base, "--data", recipe.data, "--out", tmp_path / "o", "--method", "llama-adapter",
        "--layers", "2", "--dry-run",
    )  # fmt: skip
    assert code == 0, error
    assert "adapter: llama-adapter, 10 prompts in the top 2 layers, a gate for each head, 648 parameters" in text
    assert "lr " in text and "alpha" not in text and "\nr " not in text
    code, _, error = cli(
        "train",
        "--model",
        base,
        "--data",
        recipe.data,
        "--out",
        "o",
        "--method",
        "llama-adapter",
        "--layers",
        "3",
        "--dry-run",
    )
    assert code == 2 and "layers is 3, but the base has 2" in error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 4}, "r: method 'llama-adapter' has no such setting"),
        ({"targets": ["q_proj"], "dora": True}, "targets: method 'llama-adapter'(.|\n)*dora: method 'llama-adapter'"),
        ({"layers": [0, 1]}, "counts them from the top"),
        ({"layers": 0}, "layers: got 0"),
        ({"method": "lora", "prompt_length": 5}, "prompt_length: method 'lora' has no such setting"),
        ({"method": "prompts"}, "method is 'prompts'"),
        ({"prompt_length": 0}, "prompt_length is 0"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    defaults = {"prompt_length": 10} if changes.get("method") else {}
    with pytest.raises(LoraError, match=words):
        recipe_of(Path("base"), tmp_path, **{**defaults, **changes})


def test_the_names_of_peft_are_understood(tmp_path: Path) -> None:
    fields = {
        "model": "a",
        "data": "b",
        "out": "c",
        "peft_type": "ADAPTION_PROMPT",
        "adapter_len": 7,
        "adapter_layers": 3,
    }
    with pytest.warns(LoraWarning, match="adapter_len is prompt_length here"):
        recipe = Recipe.of(**fields)
    assert (recipe.method, recipe.prompt_length, recipe.layers) == ("llama-adapter", 7, 3)


def test_an_estimate_counts_prompts_and_gates(base: Path, tmp_path: Path) -> None:
    found = estimate(recipe_of(base, tmp_path), device="cpu", tokens=16)
    assert found.trainable == 2 * (4 * 32 + 4) and found.parts["prompts and gates"] == 4 * found.trainable


def test_a_classifiers_head_trains_with_the_prompts(base: Path, tmp_path: Path) -> None:
    rows = [{"text": f"it is {word} {i}", "label": word} for i in range(8) for word in ("good", "bad")]
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(base, tmp_path, task="classify", data=str(file), max_steps=4)
    run(recipe)
    config = json.loads((Path(recipe.out) / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"] and config["task_type"] == "SEQ_CLS"
    assert load_example_tokenizer() is not None
