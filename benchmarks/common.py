"""What the benchmarks share: interleaved timing, and rows to a CSV file."""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def interleaved(variants: dict[str, Callable[[], object]], rounds: int, inner: int) -> dict[str, list[float]]:
    """Seconds a call of each variant, one value a round. The variants take turns, so that drift hits all alike."""
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            for _ in range(inner):
                run()
            seconds[name].append((time.perf_counter() - start) / inner)
    return seconds


def spread(values: list[float]) -> tuple[float, float, float]:
    """(p20, median, p80)"""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], statistics.median(values), cuts[3]


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of ours / theirs, each pair measured within the same moment."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def write_csv(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """A column for every key of any row."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def quiet_peers(variant: str) -> None:
    """The environment in which a peer's variant runs; Unsloth must be imported before transformers."""
    os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.gettempdir() + "/unsloth_compiled")
    if "unsloth" in variant:
        import unsloth  # noqa: F401


def print_result(row: dict[str, Any]) -> None:
    """What `in_processes` reads from the process of one variant."""
    print("RESULT", json.dumps(row), flush=True)


def in_processes(
    script: str, variants: list[list[str]], shown: Callable[[dict[str, Any]], str], path: str | None, seconds: float
) -> None:
    """Run the script once for each list of arguments; print a line for each, and write the CSV file after each.

    Exits with an error at the end where one of them gave no result.
    """
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for arguments in variants:
        name = " ".join(arguments)
        try:
            done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as late:
            said = (late.stderr or b"").decode(errors="replace")
            print(f"{name}: no result in {seconds:.0f} s\n{said[-1500:]}", flush=True)
            failed.append(name)
            continue
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            print(f"{name}: failed\n{done.stderr[-1500:]}" if done.returncode else name, flush=True)
            failed += [name] if done.returncode else []
            continue
        rows.append(json.loads(found[0].removeprefix("RESULT ")))
        notes = [line for line in done.stderr.splitlines() if line.startswith("gate:")]
        print("\n  ".join([shown(rows[-1]), *notes]), flush=True)
        if path:
            write_csv(path, rows)
    if failed:
        raise SystemExit(f"without a result: {', '.join(failed)}")
