"""A loss or a gradient that is not finite: the step is not taken, and too many of them end the run."""

from pathlib import Path

import pytest

from lora import LoraError
from lora.errors import NonFiniteError
from lora.train import run
from lora.train.trainer import LoraTrainer
from said import said
from tiny_base import save_tiny_base
from tiny_run import at_batches, curve, not_a_number, recipe_of, same


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("only_gradient", [False, True], ids=["loss", "gradient"])
def test_one_nan_loss_is_as_if_its_rows_were_not_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_gradient: bool
) -> None:
    what = "gradient's norm" if only_gradient else "loss"
    with (
        at_batches(not_a_number(3, only_gradient=only_gradient)),
        said(rf"step 3: the {what} is nan (rows "),
    ):
        skipped = run(recipe_of(base, tmp_path, max_steps=4)).out
    take = LoraTrainer.get_train_dataloader

    def without_the_third(self: LoraTrainer) -> object:
        rows = [self.feed.take() for _ in range(5)]
        self.feed.take = iter(rows[:2] + rows[3:]).__next__  # type: ignore[method-assign]
        return take(self)

    monkeypatch.setattr(LoraTrainer, "get_train_dataloader", without_the_third)
    plain = run(recipe_of(base, tmp_path, max_steps=4, out=str(tmp_path / "plain"))).out
    assert same(skipped, plain)
    assert curve(skipped) == curve(plain)
    assert '"skipped_steps": 1' in (skipped / "run.json").read_text()


def test_several_in_a_row_stop_the_run_with_the_last_good_state(base: Path, tmp_path: Path) -> None:
    plan = recipe_of(base, tmp_path, max_bad_steps=2, save_every=50)
    with (
        at_batches(not_a_number(3, 4)),
        said("step 3: the loss is nan"),
        pytest.raises(NonFiniteError, match=r"(?s)step 3.*2th time in a row.*after step 2 is in .*step-000002") as e,
    ):
        run(plan)
    assert (e.value.step, e.value.exit_code, isinstance(e.value, LoraError)) == (3, 5, True)
    out = Path(plan.out)
    assert not (out / "adapter_model.safetensors").exists()
    good = tmp_path / "good"
    run(recipe_of(base, tmp_path, max_steps=6, save_every=2, out=str(good)))
    assert (out / "checkpoints" / "step-000002" / "manifest.json").is_file()
    run(recipe_of(base, tmp_path, max_steps=6, out=plan.out))
    assert same(out, good)
    # The ruin did not block the folder, and its checkpoints gave way to the new run's.
    assert [path.name for path in sorted((out / "checkpoints").glob("step-*"))] == ["step-000004", "step-000006"]


def test_a_nan_in_the_first_step_saves_nothing(base: Path, tmp_path: Path) -> None:
    plan = recipe_of(base, tmp_path, max_bad_steps=1, grad_accum=2, batch_size=2)
    with (
        at_batches(not_a_number(2)),  # inside an accumulated step
        pytest.raises(NonFiniteError, match=r"step 1: the loss is nan .*Nothing was saved: there was no step"),
    ):
        run(plan)
    assert not (Path(plan.out) / "adapter_model.safetensors").exists()
    run(plan)
