"""Evaluations on the way: what they measure, when, and that they change nothing."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import lora
from lora import LoraError
from lora.data.encode import IGNORED, Encoded, encode_rows
from lora.data.template import PromptTemplate
from lora.errors import DataError, OutOfMemoryError
from lora.train import evaluations as module
from lora.train.answers import answers, question
from lora.train.evaluations import SAMPLES_FILE, Evaluations, HeldOut, spread
from lora.train.generation import generate
from lora.train.held_out import hold_out
from lora.train.metrics import read
from lora.train.watch import Watch
from tiny_base import load_example_tokenizer, save_tiny_base

ROWS = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))} for n in range(2, 8)]


@pytest.fixture(scope="module")
def template() -> PromptTemplate:
    return PromptTemplate(load_example_tokenizer())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from lora.train.base import load_base

    model = lora.inject(
        load_base(str(save_tiny_base(tmp_path_factory.mktemp("base"))), torch.float32),
        targets="all-linear",
        dropout=0.5,
    )
    return model.train()


@pytest.fixture(scope="module")
def rows(template: PromptTemplate) -> list[Encoded]:
    return encode_rows(ROWS, template, 128).rows


def held(rows: list[Encoded], template: PromptTemplate, samples: int = 2, batch_size: int = 4) -> HeldOut:
    return HeldOut(rows, template, batch_size, samples)


@contextmanager
def always_says(model: Any, token: int) -> Iterator[None]:
    def favour(head: nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., token] += 1e6
        return logits

    handle = model.lm_head.register_forward_hook(favour)
    yield
    handle.remove()


# What is held out.


def test_rows_of_one_prompt_are_held_out_together() -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p{n % 20}", "completion": f"{n}"} for n in range(100)]
    train, held_out = hold_out(rows, 0.1, seed=1)
    assert (len(train), len(held_out)) == (90, 10)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert sorted(map(str, train + held_out)) == sorted(map(str, rows))
    assert held_out == [row for row in rows if row in held_out]  # in their order
    assert hold_out(rows, 0.1, seed=1) == (train, held_out) != hold_out(rows, 0.1, seed=2)


@pytest.mark.parametrize("kind", ["text", "messages", "no prompt"])
def test_each_format_can_be_held_out(kind: str) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows: list[dict[str, Any]] = {
        "text": [{"text": f"t{n}"} for n in range(4)],
        "messages": [{"messages": [{"role": "system", "content": str(n)}, *turns, *turns]} for n in range(4)],
        "no prompt": [{"prompt": "the same", "completion": f"{n}"} for n in range(4)],
    }[kind]
    train, held_out = hold_out(rows, 0.02, seed=0)
    assert (len(train), len(held_out)) == (3, 1)


def test_rows_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(DataError, match="eval_share is 0.1, but .* all rows are the same"):
        hold_out([{"prompt": "a", "completion": "b"}] * 9, 0.1, seed=0)


# What is asked and answered.


def test_a_question_is_the_last_answer_and_what_stands_before_it() -> None:
    x = IGNORED
    two = question(Encoded(input_ids=[1, 2, 3, 4, 5, 6, 7], labels=[x, x, 3, x, 5, 6, x]))
    assert (two.prompt, two.reference, two.is_text) == ([1, 2, 3, 4], [5, 6], False)
    text = question(Encoded(input_ids=[1, 2, 3, 4], labels=[1, 2, 3, 4]))
    assert (text.prompt, text.reference, text.is_text) == ([1, 2], [3, 4], True)


def test_answers_are_those_of_generate_and_say_whether_they_stop(
    model: Any, template: PromptTemplate, rows: list[Encoded]
) -> None:
    asked = [question(row) for row in rows[:3]]
    given = answers(model, template, asked, longest=4, batch_size=2)
    told = generate(model, template.tokenizer, [row["prompt"] for row in ROWS[:3]], max_new_tokens=4)
    assert [template.tokenizer.decode(a.ids, skip_special_tokens=True) for a in given] == told
    with always_says(model, template.stop_id):
        assert [(a.ids, a.stopped) for a in answers(model, template, asked, 6, 4)] == [([], True)] * 3
    with always_says(model, 300):
        assert [(a.ids, a.stopped) for a in answers(model, template, asked, 3, 4)] == [([300] * 3, False)] * 3


def test_a_prompt_that_fills_the_model_has_no_answer(model: Any, template: PromptTemplate) -> None:
    asked = [module.Question([5] * size, [6], False) for size in (128, 126)]
    assert [len(answer.ids) for answer in answers(model, template, asked, 6, 1)] == [0, 2]


def test_samples_are_spread_over_the_rows(rows: list[Encoded]) -> None:
    assert spread(rows, 3) == [rows[0], rows[2], rows[4]]
    assert spread(rows, 99) == rows


def test_plain_texts_are_measured_and_gone_on_with(model: Any, template: PromptTemplate) -> None:
    texts = encode_rows([{"text": "The vaults are by the river."}, {"text": "A cheap pub."}], template, 128).rows
    found = held(texts, template)
    assert found.measure(model)["eval_loss"] > 0
    assert found.sampled(model)[0]["prompt"].startswith("The vaults")


# What it costs the run: nothing.


def test_an_evaluation_changes_nothing(model: Any, template: PromptTemplate, rows: list[Encoded]) -> None:
    model.config.use_cache = False
    model.model.layers[1].eval()  # a mode of its own
    modes = [each.training for each in model.modules()]
    before = torch.get_rng_state()
    found = held(rows[:2], template)
    assert found.measure(model) == found.measure(model)  # no dropout
    assert len(found.sampled(model)) == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert [each.training for each in model.modules()] == modes
    assert model.config.use_cache is False
    assert all(p.grad is None for p in model.parameters())
    model.train()


def test_an_evaluation_out_of_memory_goes_on_with_fewer_rows(
    model: Any, template: PromptTemplate, rows: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = held(rows, template, batch_size=6).measure(model)
    forward, sizes, most = model.forward, [], 2

    def limited(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("no")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", limited)
    assert held(rows, template, batch_size=6).measure(model) == pytest.approx(whole, rel=1e-5)
    assert sizes[:2] == [6, 3]
    most = 0
    with pytest.raises(OutOfMemoryError, match="one row at a time"):
        held(rows, template).measure(model)


# When it is done, and what follows from it.


class Run:
    """The callback's part of a training of so many steps, with losses that are given."""

    def __init__(self, folder: Path, losses: dict[int, float], every: int = 2, patience: int | None = None) -> None:
        self.losses, self.console = losses, Console(file=io.StringIO(), width=300)
        self.told: list[Any] = []
        self.state: Any = SimpleNamespace(global_step=0, max_steps=9)
        self.control: Any = SimpleNamespace(should_training_stop=False)
        watch = Watch(self.console, 10)
        self.evaluations = Evaluations(self, every, patience, watch, folder, told=[self.told.append])  # type: ignore[arg-type]

    def measure(self, model: Any) -> dict[str, float]:
        return {"eval_loss": self.losses[self.state.global_step]}

    def sampled(self, model: Any) -> list[dict[str, Any]]:
        return [{"sample": 1, "answer": f"after {self.state.global_step}"}]

    def go(self) -> "Run":
        self.evaluations.on_train_begin(None, self.state, self.control, model=None)
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            self.state.global_step += 1
            self.evaluations.on_step_end(None, self.state, self.control, model=None)
        self.evaluations.on_train_end(None, self.state, self.control)
        return self


def test_it_evaluates_before_on_the_way_and_at_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, {0: 5.0, 2: 4.0, 4: 3.0, 6: 3.5, 8: 2.5, 9: 3.0}).go()
    assert [(each["step"], each["eval_loss"]) for each in run.told] == list(run.losses.items())
    assert (run.evaluations.best_step, run.evaluations.best_loss) == (8, 2.5)
    assert [(line["step"], line["answer"]) for line in read(tmp_path / SAMPLES_FILE)][-1] == (9, "after 9")
    lines = run.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "step 0: eval loss 5.0000: the base, before training"
    assert lines[3] == "step 6: eval loss 3.5000, the best was 3.0000 at step 4"
    assert lines[4] == "step 8: eval loss 2.5000, the best so far"


def test_a_run_that_gets_no_better_stops(tmp_path: Path) -> None:
    run = Run(tmp_path, {0: 1.0, 1: 4.0, 2: 3.0, 3: 3.5, 4: float("nan")}, every=1, patience=2).go()
    assert run.state.global_step == 4
    assert (run.evaluations.stopped_early, run.evaluations.best_step) == (True, 2)
    assert "step 4: stopped early" in run.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_step_that_is_worse_than_the_base_is_not_called_the_best_so_far(tmp_path: Path) -> None:
    run = Run(tmp_path, {0: 10.5, 1: 20.0, 2: 21.0, 3: 22.0}, every=1, patience=2).go()
    lines = run.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[1] == "step 1: eval loss 20.0000, worse than the base (10.5000)"
    assert lines[2].endswith("the best was 20.0000 at step 1, worse than the base (10.5000)")
    assert lines[-1].endswith("than at step 1 (20.0000, now 22.0000), worse than the base (10.5000)")
    later = Run(tmp_path, {})
    later.evaluations.restore(json.loads(json.dumps(run.evaluations.state())))
    assert later.evaluations.base_loss == 10.5


def test_without_patience_it_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, dict.fromkeys(range(10), 1.0), every=1).go()
    assert (run.state.global_step, run.evaluations.stopped_early) == (9, False)
    assert run.evaluations.best_step == 1  # as good as the best is no better


def test_what_is_best_and_how_long_ago_survives_a_resume(tmp_path: Path) -> None:
    first = Run(tmp_path, {0: 5.0, 1: 3.0, 2: 4.0, 3: 4.0}, every=1, patience=3)
    first.state.max_steps = 2
    first.go()
    kept = json.loads(json.dumps(first.evaluations.state()))
    later = Run(tmp_path, {3: 4.0, 4: 4.0}, every=1, patience=3)
    later.evaluations._after = later.state.global_step = 2
    later.evaluations.restore(kept)
    later.go()
    assert (later.state.global_step, later.evaluations.best_step) == (4, 1)
    assert [line["step"] for line in read(tmp_path / SAMPLES_FILE)] == [0, 1, 2, 3, 4]


def test_a_fresh_state_is_json_too(tmp_path: Path) -> None:
    run = Run(tmp_path, {})
    run.evaluations.restore(json.loads(json.dumps(run.evaluations.state(), allow_nan=False)))
    run.evaluations.restore({})
    assert (run.evaluations.best_step, run.evaluations.best_loss) == (0, float("inf"))


def test_samples_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraError, match="samples.jsonl' could not be written"):
        Run(tmp_path / "file", {0: 1.0}).go()
