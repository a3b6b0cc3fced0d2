"""Where an adapter is saved: full disks, places that cannot be written to, links, files of others."""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import peft
import pytest

import lora
from lora import LoraError
from small_adapter import CONFIG, TENSORS, contents, found, made


def contents_of_names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def test_disk_full_at_any_size_is_our_error_and_keeps_the_old(tmp_path: Path) -> None:
    lora.save(made(1, 3), tmp_path)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = len(before[TENSORS])
    try:
        for limit in [0, 1, 8, 100, len(before[CONFIG]), *range(200, size, 97), size - 1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(LoraError, match=f"^{tmp_path}: the adapter could not be saved.*File too large"):
                lora.save(made(2, 8), tmp_path)
            assert contents(tmp_path) == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lora.save(made(2, 8), tmp_path)
    assert found(tmp_path) == (2, 8)


@pytest.mark.parametrize("trouble", ["a file", "under a file", "tensors are a folder", "config is a folder"])
def test_a_place_that_cannot_be_written_is_our_error(trouble: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    if "folder" in trouble:
        (folder / (CONFIG if "config" in trouble else TENSORS)).mkdir(parents=True)
    else:
        folder.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LoraError, match=str(folder)):
        lora.save(made(1, 3), folder / "x" if trouble == "under a file" else folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_config_that_cannot_follow_is_told_and_the_adapter_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora.save(made(1, 3), tmp_path)
    real: Callable = os.replace

    def failing(old: Path, new: Path) -> None:
        if Path(new).name == CONFIG:
            raise PermissionError(errno.EPERM, "not yours")
        real(old, new)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(LoraError, match=f"{TENSORS}: is written, but not .*{CONFIG} .not yours.; save again"):
        lora.save(made(2, 8), tmp_path)
    assert found(tmp_path) == (2, 8)
    assert contents_of_names(tmp_path) == {CONFIG, TENSORS}
    monkeypatch.undo()
    assert found(tmp_path) == (2, 8)
    assert peft.PeftConfig.from_pretrained(tmp_path).lora_alpha == 8


def test_an_interrupt_between_the_two_renames_finishes_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora.save(made(1, 3), tmp_path)
    real, calls = os.replace, []

    def interrupted(old: Path, new: Path) -> None:
        real(old, new)
        calls.append(new)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lora.save(made(2, 8), tmp_path)
    assert contents_of_names(tmp_path) == {CONFIG, TENSORS}
    assert peft.PeftConfig.from_pretrained(tmp_path).lora_alpha == 8


def test_links_stay_and_what_they_lead_to_is_replaced(tmp_path: Path) -> None:
    real, blobs = tmp_path / "real", tmp_path / "blobs"
    real.mkdir()
    blobs.mkdir()
    (tmp_path / "link").symlink_to(real)
    lora.save(made(1, 3), tmp_path / "link")
    assert contents_of_names(real) == {CONFIG, TENSORS}
    os.rename(real / TENSORS, blobs / "of-somebody")
    (real / TENSORS).symlink_to(blobs / "of-somebody")
    lora.save(made(2, 8), tmp_path / "link")
    assert (real / TENSORS).is_symlink()
    assert found(real) == found(tmp_path / "link") == (2, 8)
    assert contents_of_names(blobs) == {"of-somebody"}
