"""The attacker sees what it looks for: libraries that go wrong in each of the ways are caught in it."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kills_of_saves
import lora
import trial_of_files
from attacked_adapters import CONFIG, TENSORS, Original, originals
from kills_of_saves import at_every_call
from mutants_of_files import Mutant
from saves_under_attack import adapted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the attacker forks")
REAL = SimpleNamespace(load=lora.load, remove=lora.remove, LoraError=lora.LoraError, LoraWarning=lora.LoraWarning)


def foreign(model: nn.Module, folder: Path) -> None:
    raise KeyError(folder)


def crash(model: nn.Module, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(model: nn.Module, folder: Path) -> None:
    while True:
        pass


def greedy(model: nn.Module, folder: Path) -> None:
    bytearray(300 << 20)
    raise lora.LoraError("damaged")


def wordy(model: nn.Module, folder: Path) -> None:
    raise lora.LoraError("x" * 5000)


def drawing(model: nn.Module, folder: Path) -> None:
    torch.rand(1)
    raise lora.LoraError("damaged")


def half_done(model: nn.Module, folder: Path) -> None:
    model.head.bias.data.add_(1)
    raise lora.LoraError("damaged")


def blind(value: float) -> Callable[[nn.Module, Path], None]:
    def load(model: nn.Module, folder: Path) -> None:
        REAL.load(model, folder)
        with torch.no_grad():
            model.layers[0].q_proj.lora["default"].A[0, 0] = value

    return load


LIBRARIES = {
    "foreign": [foreign, crash], "hang": [hang], "memory": [greedy], "long message": [wordy],
    "touched": [drawing, half_done], "other values": [blind(5.0)], "not finite": [blind(float("nan"))],
}  # fmt: skip


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return originals(tmp_path_factory.mktemp("originals"), ["ours"])[0]


@pytest.mark.parametrize(("fault", "load"), [(fault, load) for fault, loads in LIBRARIES.items() for load in loads])
def test_a_library_that_goes_wrong_is_caught(
    fault: str, load: Callable, ours: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_of_files, "SECONDS", 0.5 if fault == "hang" else 30.0)
    whole = Mutant("nothing", "sealed", ours.effect, {CONFIG: ours.config, TENSORS: ours.tensors})
    assert not any(trial_of_files.run([lambda: whole] * 2, tmp_path, 1).faults().values())
    monkeypatch.setattr(trial_of_files, "lora", SimpleNamespace(**{**vars(REAL), "load": load}))
    found = trial_of_files.run([lambda: whole] * 2, tmp_path, 1)
    assert {name: count for name, count in found.faults().items() if count} == {fault: 2}
    assert found.counts["sealed", "inspect", "described"] == 2


def test_a_save_that_is_torn_by_a_kill_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {state: tmp_path / f"whole-{state}" for state in (1, 2, 4)}
    for state, folder in whole.items():
        lora.save(adapted(state), folder)

    def naive(model: nn.Module, folder: Path) -> None:
        """One file after the other, each in place."""
        state = next(int(p.flatten()[0]) for p in model.parameters() if p.requires_grad)
        for name in (TENSORS, CONFIG):
            (folder / name).write_bytes(contents[state, name])

    contents = {
        (state, name): (folder / name).read_bytes() for state, folder in whole.items() for name in (TENSORS, CONFIG)
    }
    monkeypatch.setattr(kills_of_saves, "lora", SimpleNamespace(save=naive))
    found = at_every_call(tmp_path, "over ours")
    assert found.faults()["neither old nor new"] > 0
    assert sum(found.ours.values()) == found.kills >= 2
