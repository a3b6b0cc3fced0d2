"""The short form of the attack on saves: kills, failures, crowds, odd places. `make attack` runs the long one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("attack_of_files.py")
KILLS = [
    "before each call, over ours", "before each call, over PEFT's", "before each call, the first save",
    "before each call, twice in a row", "at each size of a file", "by the clock",
]  # fmt: skip
PLACES = [
    "a read-only filesystem", "a folder without the right to write", "a file in the folder's place", "no hard links",
    "no locks", "no locks at all",
]  # fmt: skip

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the attacker forks, and mounts filesystems of its own"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the attacker found, in a process of its own, which has no threads when it forks."""
    found = tmp_path_factory.mktemp("attack") / "figures.json"
    sizes = ["--kills", "15", "--loads", "300", "--bytes", "1024", "--pairs", "12"]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--only", "saves", *sizes, "--quiet", "--json", found], capture_output=True, text=True
    )
    assert found.is_file(), done.stderr
    return json.loads(found.read_text())


def clean(line: dict[str, Any], *faults: str) -> None:
    """None of these faults, or none at all."""
    assert line["tried"]
    assert line["faults"].keys() >= set(faults)
    found = {fault: line["faults"][fault] for fault in faults or line["faults"]}
    assert not any(found.values()), (found, line["examples"])


@pytest.mark.parametrize("when", KILLS)
def test_torn_pair_after_sigkill_is_read_as_the_old_or_the_new_adapter(when: str, figures: dict[str, Any]) -> None:
    line = figures[f"SIGKILL in save, {when}"]
    clean(line, "neither old nor new", "the same where nothing may be written", "the next save did not help")


@pytest.mark.parametrize("when", KILLS)
def test_peft_reads_a_torn_pair_as_its_old_or_new_self_once_we_have_loaded_it(
    when: str, figures: dict[str, Any]
) -> None:
    found = {name for name in figures[f"SIGKILL in save, {when}"]["more"] if name.startswith("PEFT's after our load")}
    assert found <= {f"PEFT's after our load: {name}" for name in ("old", "new", "none")}


@pytest.mark.parametrize("when", KILLS)
def test_stale_temporaries_of_a_killed_save_are_gone_after_the_next(when: str, figures: dict[str, Any]) -> None:
    clean(figures[f"SIGKILL in save, {when}"], "left over after the next save")


def test_load_while_saving_is_never_wrong_and_never_calls_the_file_damaged(figures: dict[str, Any]) -> None:
    line = figures["loads against saves"]
    assert line["more"]["saves meanwhile"] > 10
    clean(line)


@pytest.mark.parametrize("how", ["several writers", "several writers, all killed"])
def test_several_writers_leave_one_adapter_whole(how: str, figures: dict[str, Any]) -> None:
    clean(figures[how])


@pytest.mark.parametrize("how", ["no file beyond n bytes", "n pages free"])
def test_disk_full_at_every_size_is_refused_and_keeps_the_old_adapter(how: str, figures: dict[str, Any]) -> None:
    if f"disk full: {how}" not in figures:
        pytest.skip("no filesystem can be mounted here")
    clean(figures[f"disk full: {how}"])


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_whichever_call_fails_the_adapter_is_whole_and_the_error_ours(error: str, figures: dict[str, Any]) -> None:
    clean(figures[f"each call fails: {error}"])


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_is_refused_and_one_without_links_or_locks_is_written(
    place: str, figures: dict[str, Any]
) -> None:
    clean(figures[f"place: {place}"])


def test_links_and_other_peoples_files_stay(figures: dict[str, Any]) -> None:
    clean(figures["odd folders"])
