"""The numbers of a step are counted once, and shown as what they are."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lora.train import watch as watch_module
from lora.train.display import size
from lora.train.steps import Step
from lora.train.watch import Watch


class Loop:
    """What Trainer and the guard do around the watch, with losses and token counts that are given."""

    def __init__(self, console: Console, log_every: int = 2, steps: int = 4) -> None:
        self.watch = Watch(console, log_every)
        self.state: Any = SimpleNamespace(global_step=0, max_steps=steps)
        self.watch.on_train_begin(None, self.state, None)

    def step(self, loss: float, tokens: int, trained: int) -> None:
        self.state.global_step += 1
        self.watch.on_step(Step(self.state.global_step, loss, 2.0, 0.25, tokens, trained))
        self.watch.on_step_end(None, self.state, None)


def plain(width: int = 400) -> Console:
    return Console(file=io.StringIO(), width=width)


def text(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_line_says_what_its_loss_is_a_mean_of() -> None:
    console = plain()
    loop = Loop(console, log_every=2, steps=5)
    for loss, trained in ((4.0, 10), (3.0, 10), (2.0, 30), (1.0, 10), (0.5, 10)):
        loop.step(loss, 50, trained)
    lines = text(console).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/5", "step 2/5", "step 4/5", "step 5/5"]
    assert "loss 4.0000 (mean over the tokens of step 1)" in lines[0]
    assert "loss 3.5000 (mean over the tokens of steps 1 to 2)" in lines[1]
    # 30 tokens of 2.0 and 10 of 1.0: a mean over tokens, not over steps.
    assert "loss 1.7500 (mean over the tokens of steps 3 to 4)" in lines[2]
    for word in ("lr 2.50e-01", "gradient norm 2", "tokens/s", "memory ", " left"):
        assert word in lines[2]
    assert lines[3].endswith("0:00:00 left")


def test_a_classifiers_loss_is_a_mean_over_rows() -> None:
    watch = Watch(plain(), 2, "rows")
    watch.on_step(Step(1, 1.0, 2.0, 0.25, 50, 4))
    assert watch.mean_of == "the rows of step 1"


def test_a_step_has_its_numbers() -> None:
    loop = Loop(plain())
    loop.step(1.5, 12, 5)
    latest = loop.watch.latest
    assert latest is not None
    assert (latest.step, latest.loss, latest.lr, latest.grad_norm) == (1, 1.5, 0.25, 2.0)
    assert (latest.tokens, latest.trained) == (12, 5)
    assert latest.memory > 1 << 20
    assert latest.tokens_per_second > 0


def test_time_of_an_evaluation_is_not_the_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(watch_module.time, "perf_counter", lambda: now[0])
    loop = Loop(plain())
    with loop.watch.paused("evaluating"):
        now[0] += 50
    now[0] += 2
    loop.step(1.0, 10, 3)
    assert (loop.watch.seconds, loop.watch.tokens_per_second) == (2.0, 5.0)
    assert loop.watch.paused_seconds == 50.0
    loop.watch.on_train_end(None, loop.state, None)
    now[0] += 50
    with loop.watch.paused():
        now[0] += 50
    assert loop.watch.seconds == 2.0


def test_a_run_that_never_began_has_no_time() -> None:
    watch = Watch(plain(), 10)
    with watch.paused():
        pass
    watch.stop()
    assert (watch.seconds, watch.tokens_per_second) == (0.0, 0.0)


def test_counting_goes_on_where_a_checkpoint_left_it() -> None:
    loop = Loop(plain(), log_every=3)
    for loss in (3.0, 2.0):
        loop.step(loss, 5, 4)
    loop.watch.evaluated(2, 2.5)
    other = Loop(plain(), log_every=3)
    other.watch.restore(loop.watch.state())
    other.state.global_step = 2
    other.step(1.0, 5, 4)
    assert (other.watch.steps, other.watch.tokens, other.watch.trained) == (3, 15, 12)
    assert (other.watch.recent_loss, other.watch.mean_of) == (2.0, "the tokens of steps 1 to 3")
    assert other.watch.eval_loss == 2.5
    assert other.watch.seconds > loop.watch.seconds
    assert other.watch.paused_seconds == loop.watch.paused_seconds


def test_on_a_terminal_there_is_one_display_and_no_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160, height=20)
    loop = Loop(console)
    try:
        for loss in (4.0, 3.0, 2.0):
            loop.step(loss, 50, 10)
        loop.watch.evaluated(3, 1.25, ", the best so far")
        with loop.watch.paused("evaluating"):
            pass
    finally:
        loop.watch.stop()
    shown = text(console)
    for part in ("step 3/4", "loss 2.5000 (mean over the tokens of steps 2 to 3)", "gradient norm 2", "evaluating"):
        assert part in shown
    assert "\x1b[2K" in shown  # it is drawn over, and gone in the end
    kept = [line for line in shown.split("\n") if "\x1b" not in line]
    assert not any("loss 3.5" in line for line in kept)


def test_bytes_are_written_as_people_read_them() -> None:
    assert [size(n) for n in (0, 512 << 20, 1900 << 20)] == ["0 MiB", "512 MiB", "1.9 GiB"]
