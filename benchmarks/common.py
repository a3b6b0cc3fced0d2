"""What the benchmarks share: interleaved timing, and rows to a CSV file."""

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

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


def write_csv(name: str, rows: list[dict[str, object]]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
