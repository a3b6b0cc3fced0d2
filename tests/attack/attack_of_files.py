"""Attack adapter files, saves and loads, and print one table: what was tried, and how often it went wrong.

python tests/attack/attack_of_files.py                      the long form, about an hour on two cores
python tests/attack/attack_of_files.py --mutants 4000 --kills 100 --loads 500 --pairs 6
python tests/attack/attack_of_files.py --write              and put the table into docs/reliability.md
"""

import argparse
import errno
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import trial_of_files
from attacked_adapters import originals
from crowds_of_files import killed_writers, loads_against_saves, several_writers
from failures_of_saves import PLACES, failing_call, file_limit, full_disk, in_place, odd_folders
from kills_of_saves import Kills, kills

HERE = Path(__file__).parent
BEFORE = HERE / "before_of_files.json"
PAGE = HERE.parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- figures of files -->", "<!-- end of the figures of files -->"


def row(tried: int, faults: Mapping[str, int], more: Mapping[str, Any], examples: Mapping[str, int]) -> dict[str, Any]:
    """One line of the table. more: what else came of it. examples: faults in words, the most frequent first."""
    first = dict(sorted(examples.items(), key=lambda item: -item[1])[:40])
    return {"tried": tried, "faults": dict(faults), "more": {k: n for k, n in more.items() if n}, "examples": first}


def of_mutants(place: Path, asked: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    started = time.monotonic()
    cases = trial_of_files.cases_of(originals(place), asked.mutants, asked.seed)
    found = trial_of_files.run(cases, place, asked.jobs, progress=not asked.quiet)
    seconds = time.monotonic() - started
    for kind in ("sealed", "sealed anew", "unsealed"):
        for verb in ("load", "inspect"):
            counts = {out: n for (k, v, out), n in sorted(found.counts.items()) if (k, v) == (kind, verb)}
            only_load = ("other values", "not finite", "touched")
            faults = {f: counts.pop(f, 0) for f in trial_of_files.FAULTS if verb == "load" or f not in only_load}
            words = {w: n for e in found.examples.values() for w, n in e.items() if w.startswith(f"{verb}, {kind}:")}
            yield f"mutants {kind}, {verb}", row(sum(counts.values()) + sum(faults.values()), faults, counts, words)
    if not asked.quiet:
        print(f"{1000 * seconds / asked.mutants:.1f} s for 1,000 mutants", file=sys.stderr)


def of_kills(name: str, found: Kills) -> tuple[str, dict[str, Any]]:
    readers = {"ours": found.ours, "PEFT's": found.peft, "PEFT's after our load": found.peft_after_load}
    more = {f"{who}: {what}": n for who, counts in readers.items() for what, n in counts.items()}
    more["names left by the kills"] = found.left_by_kills
    return f"SIGKILL in save, {name}", row(found.kills, found.faults(), more, found.examples)


def of_saves(place: Path, asked: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, found in kills(place, asked.kills, asked.bytes, asked.pairs, asked.seed).items():
        yield of_kills(name, found)
    crowd = loads_against_saves(place, asked.loads)
    more = {"saves meanwhile": sum(crowd.saves.values()), "inspections": sum(crowd.inspections.values())}
    yield "loads against saves", row(sum(crowd.loads.values()), crowd.faults(), more, crowd.examples)
    crowd = several_writers(place, 3, max(10, asked.kills // 3))
    yield "several writers", row(sum(crowd.saves.values()), crowd.faults(), {}, crowd.examples)
    crowd = killed_writers(place, 3, 0.5)
    yield "several writers, all killed", row(1, crowd.faults(), {}, crowd.examples)
    failures = {
        "disk full: no file beyond n bytes": file_limit(place, asked.bytes),
        "disk full: n pages free": full_disk(place),
        "each call fails: ENOSPC": failing_call(place, errno.ENOSPC),
        "each call fails: EIO": failing_call(place, errno.EIO),
        **{f"place: {name}": in_place(place, name) for name in PLACES},
    }
    for name, found in failures.items():
        if found is not None:  # no filesystem can be mounted here
            yield name, row(found.tried, found.faults(), found.saves, found.examples)
    odd = odd_folders(place)
    wrong = {f"{name}: {text}": 1 for name, text in odd.items() if text != "as it should be"}
    yield "odd folders", row(len(odd), {"not as it should be": len(wrong)}, {}, wrong)


def attack(asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All attacks, by name."""
    torch.set_num_threads(1)
    both = {"mutants": of_mutants, "saves": of_saves}
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)  # some of the processes give up their rights
        found: dict[str, dict[str, Any]] = {}
        for attacks in [both[asked.only]] if asked.only else both.values():
            for name, line in attacks(Path(place), asked):
                found[name] = line
                if not asked.quiet:
                    print(f"{name}: {line['tried']:,}, {in_words(line['faults'])}", file=sys.stderr)
        return found


def in_words(faults: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in faults.items() if n) or "0"


def table(figures: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| attack | before: tried | faults | now: tried | faults | PEFT's reader now |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys([*before, *figures]):
        cells = [name]
        for line in (before.get(name), figures.get(name)):
            cells += ["", ""] if line is None else [f"{line['tried']:,}", in_words(line["faults"])]
        more = figures[name]["more"] if name in figures else {}
        cells.append(", ".join(f"{k.partition(': ')[2]} {n:,}" for k, n in more.items() if k.startswith("PEFT's: ")))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=1000, help="by the clock; those before each call come on top")
    parser.add_argument("--loads", type=int, default=10_000)
    parser.add_argument("--bytes", type=int, default=64, help="between the sizes at which a write is stopped")
    parser.add_argument("--pairs", type=int, default=1, help="two kills in a row: at each n-th call")
    parser.add_argument("--only", choices=("mutants", "saves"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures, with examples of the faults, to this file")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    parser.add_argument("--quiet", action="store_true", help="say nothing before the table")
    return parser


def main() -> None:
    asked = arguments().parse_args()
    figures = attack(asked)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    before = json.loads(BEFORE.read_text(encoding="utf-8")) if BEFORE.is_file() else {}
    print(table(figures, before))
    if asked.write:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n\n{table(figures, before)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    sys.exit(any(n for line in figures.values() for n in line["faults"].values()))


if __name__ == "__main__":
    main()
