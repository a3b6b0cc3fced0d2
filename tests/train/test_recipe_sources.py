"""Where a recipe comes from: FinLoRA's files, the recipes that ship, a file by name."""

import json
from pathlib import Path

import pytest

from lora import LoraError
from lora.train import Recipe, load_recipe
from lora.train.sources import entries, shipped

FINLORA = Path(__file__).parent / "finlora"
FILES = {"finetune_configs.json": 39, "finetune_configs_multi.json": 12, "finetune_configs_plain.json": 8}


def run(name: str, file: str = "finetune_configs.json") -> Recipe:
    return load_recipe(name, recipes=FINLORA / file)


@pytest.mark.parametrize("file", FILES)
def test_every_run_of_finlora_maps(file: str) -> None:
    names = entries(FINLORA / file)
    assert len(names) == FILES[file]
    for name, entry in names.items():
        recipe = run(name, file)
        assert (recipe.model, recipe.out) == (entry["base_model"], f"lora_adapters/{name}")
        assert recipe.data.endswith(entry["dataset_path"])
        assert (recipe.r, recipe.lr, recipe.epochs) == (entry["lora_r"], entry["learning_rate"], entry["num_epochs"])
        assert recipe.batch_size * recipe.grad_accum == entry["batch_size"] * entry["gradient_accumulation_steps"]
        assert recipe.quantize == {8: "int8", 4: "nf4", None: "none"}[entry.get("quant_bits")]
        assert recipe.adapter().dora == entry.get("peft_use_dora", False)
        assert recipe.rslora == entry.get("peft_use_rslora", False)
        assert recipe.adapter().alpha == entry.get("lora_alpha", 16)
        # what its script fixes
        assert (recipe.targets, recipe.dropout, recipe.template) == (["q_proj", "k_proj", "v_proj"], 0.05, "inst")
        assert (recipe.eval_share, recipe.max_length, recipe.schedule, recipe.warmup_steps) == (
            0.02,
            4096,
            "cosine",
            10,
        )


def test_the_run_of_finlora_s_documentation_ships() -> None:
    recipe = load_recipe("sentiment_llama_3_1_8b_8bits_r8")
    assert (recipe.model, recipe.r, recipe.quantize) == ("meta-llama/Llama-3.1-8B-Instruct", 8, "int8")
    assert (recipe.lr, recipe.epochs, recipe.batch_size, recipe.grad_accum) == (1e-4, 4, 8, 2)
    assert (recipe.adapter().alpha, recipe.template) == (16, "inst")


@pytest.mark.parametrize("below", ["lora/../data/train", "data/train", "train", "."])
def test_an_entry_s_rows_are_found_from_its_file(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "lora" if below.startswith("lora/..") else tmp_path
    rows = tmp_path / below / "formula_train.jsonl"
    folder.mkdir(exist_ok=True)
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text("{}\n")
    (folder / "configs.json").write_bytes((FINLORA / "finetune_configs.json").read_bytes())
    found = load_recipe("formula_llama_3_1_8b_8bits_r8", recipes=folder / "configs.json")
    assert Path(found.data).samefile(rows)


def test_a_file_of_one_s_own_recipes(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("small:\n  model: m\n  data: d\n  out: o\n  r: 2\nlarge:\n  r: 64\n")
    assert load_recipe("small", recipes=tmp_path / "mine.yaml").r == 2
    with pytest.raises(LoraError, match="large: 3 mistakes\n  - model is missing"):
        load_recipe("large", recipes=tmp_path / "mine.yaml")
    with pytest.raises(LoraError, match="holds no 'smal'; near names: small"):
        load_recipe("smal", recipes=tmp_path / "mine.yaml")
    with pytest.raises(LoraError, match="give the name of one of its recipes"):
        load_recipe(None, recipes=tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("model: m\n")
    with pytest.raises(LoraError, match=r"'model' in .* is str; the file must hold recipes by name"):
        load_recipe("model", recipes=tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("entry", "told"),
    [({"lora_rank": 8}, "unknown key 'lora_rank'; near names: lora_r"), ({"lora_r": None}, "lora_r is None"),
     ({"dataset_path": ["a"]}, "dataset_path is"), ({"quant_bits": 3}, "quant_bits is 3"),
     ({"lora_r": 0}, "1 mistake\n  - r: got 0")],
)  # fmt: skip
def test_a_broken_entry_is_one_error(tmp_path: Path, entry: dict[str, object], told: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"run": {"base_model": "m", "dataset_path": "d", **entry}}))
    with pytest.raises(LoraError, match=told):
        load_recipe("run", recipes=tmp_path / "c.json")


def test_recipes_that_ship_are_whole_but_for_what_the_user_has() -> None:
    assert {"qlora", "chat", "classifier", "e2e_tiny", "sentiment_llama_3_1_8b_8bits_r8"} == set(shipped())
    for name in shipped():
        load_recipe(name, {"model": "m", "data": "d", "out": "o"})
    assert load_recipe("e2e_tiny").r == 8
    with pytest.raises(LoraError, match="qlora: 3 mistakes\n  - model is missing"):
        load_recipe("qlora")


def test_a_name_that_is_none_gets_a_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoraError, match="no recipe and no file 'qlor'; near names: qlora"):
        load_recipe("qlor")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qlora").write_text("model: mine\ndata: d\nout: o\n")  # a file of one's own goes first
    assert load_recipe("qlora").model == "mine"
