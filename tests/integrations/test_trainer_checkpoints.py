"""transformers' Trainer over adapters: checkpoints of the adapters alone, resumed to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import lora
from conftest import randomize
from lora.integrations import adapters_only
from lora.integrations.carried import load_adapters, save_adapters
from trained_by_others import ADAPTER, adapted, losses, names, rows, same_adapters, size, trainer, wide_llama

STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run of four steps, with a checkpoint at the second and the fourth."""
    made = trainer(adapters_only(Trainer), adapted(), tmp_path_factory.mktemp("unbroken"))
    made.train()
    return made, Path(made.args.output_dir)


def test_a_checkpoint_holds_the_adapter_and_the_trainers_state_and_no_base(unbroken: tuple[Any, Path]) -> None:
    made, folder = unbroken
    checkpoint = folder / "checkpoint-2"
    assert names(checkpoint) == ADAPTER | STATE
    adapter = 4 * sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 2 * adapter + 4000
    # Adam's two moments make three times the adapter in all; each file has some KB of names around.
    assert size(checkpoint, but=("training_args.bin", "rng_state.pth")) < 3 * adapter + 20_000
    assert size(checkpoint) < 4 * sum(p.numel() for p in wide_llama().parameters()) / 3


def test_a_resumed_run_has_the_losses_and_the_adapter_of_the_unbroken_one(
    unbroken: tuple[Any, Path], tmp_path: Path
) -> None:
    first, folder = unbroken
    again = trainer(adapters_only(Trainer), randomize(adapted()), tmp_path)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert losses(again) == losses(first)
    assert len(losses(first)) == 4
    assert same_adapters(again.model, first.model)


@pytest.mark.slow
def test_true_resumes_from_the_newest_checkpoint(tmp_path: Path) -> None:
    trainer(adapters_only(Trainer), adapted(), tmp_path).train()
    again = trainer(adapters_only(Trainer), adapted(), tmp_path, max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").is_file()


def test_an_object_of_a_trainer_is_taken_as_well(unbroken: tuple[Any, Path], tmp_path: Path) -> None:
    made = trainer(Trainer, adapted(), tmp_path)
    assert adapters_only(made) is made
    assert adapters_only(made) is made  # twice is once
    assert isinstance(made, Trainer)
    assert type(made) is adapters_only(Trainer)
    made.train()
    assert names(tmp_path / "checkpoint-2") == ADAPTER | STATE
    assert losses(made) == losses(unbroken[0])


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    made = trainer(
        adapters_only(Trainer), adapted(), tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    made.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry}
    best = max(evaluated, key=evaluated.__getitem__)
    assert best == 2  # the loss falls, and what was asked for is the highest
    wanted = adapted()
    load_adapters(wanted, tmp_path / f"checkpoint-{best}")
    assert same_adapters(made.model, wanted)
    assert made.evaluate()["eval_loss"] == pytest.approx(evaluated[best], abs=1e-6)


def test_save_model_writes_the_adapter_for_lora_load(unbroken: tuple[Any, Path], tmp_path: Path) -> None:
    made, _ = unbroken
    made.save_model(str(tmp_path / "out"))
    assert names(tmp_path / "out") == {*ADAPTER, "training_args.bin"}
    fresh = lora.load(wide_llama(), tmp_path / "out").eval()
    ids = torch.tensor([row["input_ids"] for row in rows(2)])
    assert torch.equal(fresh(ids).logits, made.model.eval()(ids).logits)


@pytest.mark.slow
def test_without_adapters_a_trainer_writes_what_it_always_does(tmp_path: Path) -> None:
    model = wide_llama()
    made = trainer(adapters_only(Trainer), model, tmp_path, max_steps=2)
    made.train()
    assert "model.safetensors" in names(tmp_path / "checkpoint-2")
    again = trainer(adapters_only(Trainer), wide_llama(), tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert same_adapters(again.model, model)


@pytest.mark.filterwarnings("ignore:save_pretrained")
@pytest.mark.slow
def test_a_checkpoint_of_before_with_the_whole_model_is_resumed(tmp_path: Path) -> None:
    first = trainer(Trainer, adapted(), tmp_path)
    first.train()
    again = trainer(adapters_only(Trainer), adapted(), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(first)


def test_of_two_that_train_each_has_its_folder_and_a_frozen_one_has_none(tmp_path: Path) -> None:
    def three() -> Any:
        model = lora.inject(adapted(), r=2, targets=["k_proj"], name="second")
        lora.inject(model, r=2, targets=["o_proj"], name="frozen")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora." in name and ".frozen." not in name)
        lora.activate(model, ["default", "second"])
        return model

    made = trainer(adapters_only(Trainer), three(), tmp_path, max_steps=2)
    made.train()
    assert names(tmp_path / "checkpoint-2") == ADAPTER | STATE | {"second"}
    again = three()
    load_adapters(again, tmp_path / "checkpoint-2")
    assert same_adapters(again, made.model)


def test_what_trains_beside_the_adapters_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = adapted()
    model.lm_head.weight.requires_grad_(True)
    made = trainer(adapters_only(Trainer), model, tmp_path)
    with pytest.raises(lora.LoraError, match="1 parameters outside its adapters train .*lm_head.weight; name"):
        made.train()
    assert made.state.global_step == 0


def test_a_module_trained_whole_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    made = trainer(adapters_only(Trainer), adapted(train=["lm_head"]), tmp_path, max_steps=2)
    made.train()
    again = adapted(train=["lm_head"])
    load_adapters(again, tmp_path / "checkpoint-2")
    assert same_adapters(again, made.model)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"alpha": 3}, "saved with other settings: lora_alpha is 4 there and 3 here"),
        ({"r": 4, "alpha": 4}, "other settings: r is 2 there and 4 here"),
        ({"targets": ["q_proj"]}, "other settings: target_modules"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_and_nothing_changes(
    other: dict[str, Any], said: str, tmp_path: Path
) -> None:
    save_adapters(randomize(adapted(alpha=4)), tmp_path)
    model = adapted(**other)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(lora.LoraError, match=said):
        load_adapters(model, tmp_path)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path) -> None:
    save_adapters(randomize(adapted()), tmp_path)
    other = lora.inject(wide_llama(seed=9), r=2, targets=["q_proj", "v_proj"])
    with pytest.raises(lora.LoraError, match="trained on another base"):
        load_adapters(other, tmp_path)


def test_a_merged_model_is_saved_and_filled_as_one_that_is_not(tmp_path: Path) -> None:
    model = randomize(adapted())
    lora.merge(model)
    save_adapters(model, tmp_path)
    again = adapted()
    load_adapters(again, tmp_path)
    lora.unmerge(model)
    assert same_adapters(again, model)
    lora.merge(model)
    load_adapters(model, tmp_path)
    assert next(iter(lora.layers.hosts(model)))[2].undo is not None


def test_an_adapter_in_another_dtype_is_filled_with_a_word(tmp_path: Path) -> None:
    save_adapters(randomize(adapted()), tmp_path)
    model = adapted().to(torch.bfloat16)
    with pytest.warns(lora.LoraWarning, match="float32 there, torch.bfloat16 here"):
        load_adapters(model, tmp_path)


def test_something_else_than_a_trainer_is_refused() -> None:
    with pytest.raises(lora.LoraError, match="trainer: got 3; allowed are transformers' Trainer"):
        adapters_only(3)
