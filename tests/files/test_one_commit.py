"""A save is one commit, a load one snapshot: whatever ends a save, and whoever writes beside it."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from lora import LoraError
from lora.files import adapter
from lora.files.adapter import read
from lora.files.commit import locked, replaced
from lora.files.description import describe
from small_adapter import CONFIG, TENSORS, contents, found, made, net


def torn(folder: Path) -> bytes:
    """The new tensors beside the old config, as a SIGKILL between the two renames leaves them; the new config."""
    lora.save(made(1, 3), folder)
    old = (folder / CONFIG).read_bytes()
    lora.save(made(2, 8), folder)
    new = (folder / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes(old)
    return new


def test_torn_pair_is_the_new_adapter_and_the_load_repairs_it(tmp_path: Path) -> None:
    new = torn(tmp_path)
    assert "alpha 8" in str(describe(tmp_path))  # inspect reads the same and writes nothing
    assert (tmp_path / CONFIG).read_bytes() != new
    assert found(tmp_path) == (2, 8)
    assert contents(tmp_path).keys() == {CONFIG, TENSORS}
    assert (tmp_path / CONFIG).read_bytes() == new
    assert peft.PeftConfig.from_pretrained(tmp_path).lora_alpha == 8


def test_torn_pair_of_a_folder_that_had_tensors_alone(tmp_path: Path) -> None:
    lora.save(made(1, 3), tmp_path)
    (tmp_path / CONFIG).unlink()
    lora.save(made(2, 8), tmp_path)
    new = (tmp_path / CONFIG).read_bytes()
    (tmp_path / CONFIG).unlink()
    assert found(tmp_path) == (2, 8)
    assert (tmp_path / CONFIG).read_bytes() == new


def test_torn_pair_is_repaired_by_the_next_save_whoever_is_torn_again(tmp_path: Path) -> None:
    torn(tmp_path)
    stale = (tmp_path / CONFIG).read_bytes()
    lora.save(made(5, 6), tmp_path)
    assert found(tmp_path) == (5, 6)
    (tmp_path / CONFIG).write_bytes(stale)  # the second save was ended at the same place
    assert found(tmp_path) == (5, 6)


def test_torn_pair_is_not_one_that_was_edited_by_hand(tmp_path: Path) -> None:
    torn(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "lora_alpha": 5}))
    with pytest.raises(LoraError, match="is not the one saved with the tensors"):
        lora.load(net(), tmp_path)
    model = lora.load(net(), tmp_path, check=False)
    assert model[0].lora["default"].scaling == 2.5
    assert json.loads((tmp_path / CONFIG).read_text())["lora_alpha"] == 5  # what somebody wrote stays
    (tmp_path / CONFIG).write_text(json.dumps({**config, "lora_alpha": 8, "note": "mine"}))
    assert found(tmp_path) == (2, 8)
    assert json.loads((tmp_path / CONFIG).read_text())["note"] == "mine"


def test_torn_pair_with_a_damaged_header_is_damaged_and_nothing_is_repaired(tmp_path: Path) -> None:
    torn(tmp_path)
    raw = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(raw.replace(rb"\"lora_alpha\": 8", rb"\"lora_alpha\": 9"))
    before = contents(tmp_path)
    assert before[TENSORS] != raw
    with pytest.raises(LoraError, match="checksum"):
        lora.load(net(), tmp_path)
    assert describe(tmp_path).damaged
    assert contents(tmp_path) == before


def test_torn_pair_where_nothing_can_be_written_loads_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn(tmp_path)
    before = contents(tmp_path)

    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(os, "replace", refuse)
    assert found(tmp_path) == (2, 8)
    assert contents(tmp_path) == before


def test_torn_pair_is_left_to_the_writer_that_is_there(tmp_path: Path) -> None:
    torn(tmp_path)
    before = contents(tmp_path)
    with locked(tmp_path) as alone:
        assert alone
        assert found(tmp_path) == (2, 8)
        assert contents(tmp_path) == before


def gone_at_call(stop: int, act: Callable[[], None]) -> bool:
    """Act in a process that ends before its n-th call of these; whether it got so far."""
    child = os.fork()
    if not child:
        left = [stop]

        def counted(real: Callable) -> Callable:
            def call(*args: object) -> object:
                left[0] -= 1
                if not left[0]:
                    os._exit(9)
                return real(*args)

            return call

        try:
            for name in ("replace", "fsync", "listdir", "unlink"):
                setattr(os, name, counted(getattr(os, name)))
            act()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("kind", ["ours", "PEFT's", "nothing"])
def test_torn_pair_at_every_call_of_a_save(kind: str, tmp_path: Path) -> None:
    """The process is gone at the n-th call that changes a name or syncs: the old adapter or the new one."""
    if kind == "ours":
        lora.save(made(1, 3), tmp_path)
    elif kind == "PEFT's":
        lora.save(made(1, 3), tmp_path)
        save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS, {"format": "pt"})
        config = json.loads((tmp_path / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps({**config, "peft_version": "0.21.2"}))
    start, states = contents(tmp_path), []
    for stop in range(1, 30):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, raw in start.items():
            (tmp_path / name).write_bytes(raw)
        ended = gone_at_call(stop, lambda: lora.save(made(2, 8), tmp_path))
        try:
            states.append(found(tmp_path))
        except LoraError:
            states.append((0, 0))
        lora.save(made(4, 5), tmp_path)
        assert contents(tmp_path).keys() == {CONFIG, TENSORS}
        assert found(tmp_path) == (4, 5)
        if not ended:
            break
    old = (0, 0) if kind == "nothing" else (1, 3)
    assert states == sorted(states) and set(states) == {old, (2, 8)}


def test_stale_temporaries_are_swept_by_the_next_save_and_nothing_else(tmp_path: Path) -> None:
    lora.save(made(1, 3), tmp_path)
    ours = [
        f".{TENSORS}.0a1b2c3d.tmp",
        f".{CONFIG}.ab_d2xyz.tmp",
        f".{TENSORS}.ab_d2xyz.old",
        f".{CONFIG}.00000000.old",
    ]
    theirs = [f".{TENSORS}.tmp", f".{CONFIG}.0a1b2c3d.tmp.bak", ".run.json.0a1b2c3d.tmp", f"x.{TENSORS}.0a1b2c3d.tmp"]
    for name in [*ours, *theirs, "README.md", ".hidden"]:
        (tmp_path / name).write_text("a")
    (tmp_path / f".{TENSORS}.11111111.tmp").mkdir()  # a folder is nobody's temporary file
    lora.save(made(2, 8), tmp_path)
    assert contents_of_names(tmp_path) == {CONFIG, TENSORS, "README.md", ".hidden", *theirs, f".{TENSORS}.11111111.tmp"}


def contents_of_names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def test_stale_temporaries_of_other_files_go_with_their_next_write(tmp_path: Path) -> None:
    (tmp_path / ".run.json.0a1b2c3d.tmp").write_text("a")
    with replaced(tmp_path / "run.json") as new:
        new.write_text("{}")
    assert contents_of_names(tmp_path) == {"run.json"}


def test_a_writer_waits_for_the_one_that_is_there(tmp_path: Path) -> None:
    lora.save(made(1, 3), tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import small_adapter as t\n"
        "print('ready', flush=True); t.lora.save(t.made(2, 8), sys.argv[1])"
    )
    with locked(tmp_path):
        command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parents[1])]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):  # long enough for a save of 1 KB
            other.wait(1)
        assert contents_of_names(tmp_path) == {CONFIG, TENSORS}
        assert found(tmp_path) == (1, 3)
    assert other.wait(60) == 0
    assert found(tmp_path) == (2, 8)


def test_without_locks_a_save_works_and_sweeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def none_here(*args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none_here)
    tmp_path.joinpath(f".{TENSORS}.0a1b2c3d.tmp").write_text("a live writer's, for all we know")
    lora.save(made(2, 8), tmp_path)
    assert found(tmp_path) == (2, 8)
    assert contents_of_names(tmp_path) == {CONFIG, TENSORS, f".{TENSORS}.0a1b2c3d.tmp"}


def test_no_hard_links_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **keywords: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    lora.save(made(1, 3), tmp_path)
    lora.save(made(2, 8), tmp_path)
    assert found(tmp_path) == (2, 8)


def quick_writer(folder: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Somebody saves between a reader's two files, the first few times that one reads."""
    real, calls = adapter._config_bytes, []

    def read_config(where: Path) -> bytes | None:
        if len(calls) < times:
            calls.append(len(calls))
            lora.save(made(len(calls) + 10, len(calls) + 20), folder)
        return real(where)

    monkeypatch.setattr(adapter, "_config_bytes", read_config)
    return calls


@pytest.mark.parametrize("check", [True, False])
def test_load_while_saving_reads_again_and_never_mixes_two_saves(
    check: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora.save(made(1, 3), tmp_path)
    assert len(quick_writer(tmp_path, monkeypatch, 3)) == 0
    part = lora.load(net(), tmp_path, check=check)[0].lora["default"]
    assert (part.A.unique().item(), part.scaling * 2) == (13, 23)


def test_load_while_saving_all_the_time_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora.save(made(1, 3), tmp_path)
    monkeypatch.setattr(adapter, "TRIES", 4)
    quick_writer(tmp_path, monkeypatch, 10**9)
    with pytest.raises(LoraError, match="was written over 4 times while it was read"):
        lora.load(net(), tmp_path)


def test_load_while_saving_parses_the_bytes_that_it_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is replaced after its header was read: the tensors are still those of that file."""
    lora.save(made(1, 3), tmp_path)
    real = adapter.AdapterFile.tensors

    def replaced_before(file: adapter.AdapterFile) -> dict:
        lora.save(made(2, 8), tmp_path)
        return real(file)

    monkeypatch.setattr(adapter.AdapterFile, "tensors", replaced_before)
    assert found(tmp_path) == (1, 3)
    monkeypatch.undo()
    assert found(tmp_path) == (2, 8)


def test_load_while_somebody_copies_over_the_file_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (1, 2):
        model = lora.inject(nn.Sequential(nn.Linear(512, 512)), r=32, targets=["0"])
        with torch.no_grad():
            model[0].lora["default"].A.fill_(value)
        lora.save(model, tmp_path / str(value))
    new, real = (tmp_path / "2" / TENSORS).read_bytes(), adapter.AdapterFile.tensors
    calls = []

    def copied_over(file: adapter.AdapterFile) -> dict:
        calls.append(1)
        if len(calls) == 1:  # in place, after the header was read
            (tmp_path / "1" / TENSORS).write_bytes(new)
            os.utime(tmp_path / "1" / TENSORS, ns=(1, 1))  # the clock of a filesystem may be slower than this test
        return real(file)

    monkeypatch.setattr(adapter.AdapterFile, "tensors", copied_over)
    loaded = lora.load(nn.Sequential(nn.Linear(512, 512)), tmp_path / "1", check=False)
    assert loaded[0].lora["default"].A.unique().tolist() == [2]
    assert len(calls) == 2


def test_a_load_opens_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora.save(made(1, 3), tmp_path)
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    lora.load(net(), tmp_path)
    ours = [Path(path).name for path in opened if path.startswith(str(tmp_path))]
    assert sorted(ours) == [CONFIG, TENSORS]


def test_a_config_that_is_right_already_is_left_alone(tmp_path: Path) -> None:
    lora.save(made(1, 3), tmp_path)
    before = (tmp_path / CONFIG).stat()
    lora.save(made(2, 3), tmp_path)
    after = (tmp_path / CONFIG).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert found(tmp_path) == (2, 3)


def test_the_header_has_the_settings_and_others_read_the_file(tmp_path: Path) -> None:
    model = made(1, 3)
    lora.save(model, tmp_path)
    with safe_open(tmp_path / TENSORS, "pt") as opened:
        header = opened.metadata()
    assert header["lora.settings"] == (tmp_path / CONFIG).read_text()
    assert header["format"] == "pt"
    assert {"lora.settings", "lora.replaces"} & read(tmp_path).metadata.keys() == set()
