"""FinLoRA's sentiment task end to end: train on rows of its files, score base and adapter as its script does.

FinLoRA trains on a file of its own and tests on four more (tfns, fiqa, fpb, nwgi). Here only test files are asked for:
a share of each one's rows is trained on and the rest is scored, so the figures are not those of its table. The prompts
are wrapped in [INST] in training and in scoring. Training and scoring are `lora train`'s and `lora eval`'s own code.

    python benchmarks/finlora.py MODEL --rows FinLoRA/data/test --steps 600
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, write_csv
from rich.console import Console

import lora
from lora.evaluation.columns import ADAPTER, BASE, columns, measure, side_by_side
from lora.evaluation.report import Report
from lora.evaluation.scores import most_frequent
from lora.evaluation.sets import task_set
from lora.evaluation.tasks import TASKS, Task, read_task
from lora.train import Recipe, run
from lora.train.base import load_base, load_tokenizer, pick_dtype

SENTIMENT = ("tfns", "fiqa", "fpb", "nwgi")


def parted(folder: Path, work: Path, share: float, most: int | None) -> list[Task]:
    """Writes train.jsonl and each task's rows to score into `work`; the tasks whose file is there."""
    draw, train, found = random.Random(0), [], []
    for task in (TASKS[name] for name in SENTIMENT):
        if not (folder / task.file).is_file():
            print(f"{task.name}: no {task.file} there, left out")
            continue
        rows = read_task(task, folder)
        draw.shuffle(rows)
        cut = round(share * len(rows))
        train += rows[:cut]
        scored = rows[cut:][:most]
        (work / task.file).write_text("".join(json.dumps(row) + "\n" for row in scored), encoding="utf-8")
        found.append(task)
    draw.shuffle(train)
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train), encoding="utf-8")
    print(f"{len(train):,} rows to train on")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=Path, required=True, help="folder of FinLoRA's test files")
    parser.add_argument("--share", type=float, default=0.7, help="of each file's rows that is trained on")
    parser.add_argument("--most", type=int, help="rows of each task that are scored at most")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "finlora.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tasks = parted(args.rows, work, args.share, args.most)
        recipe = Recipe.of(
            model=args.model, data=str(work / "train.jsonl"), out=str(work / "adapter"), targets="all-linear",
            r=args.r, alpha=2 * args.r, max_steps=args.steps, batch_size=args.batch_size, lr=args.lr,
            template="inst", seed=args.seed, check=False, group_by_length=True,
        )  # fmt: skip
        start = time.perf_counter()
        run(recipe, console=Console(stderr=True))
        seconds = time.perf_counter() - start
        model, tokenizer = load_base(args.model, pick_dtype("auto")), load_tokenizer(args.model)
        lora.load(model, work / "adapter")
        sets = [task_set(task, work, None, None) for task in tasks]
        names = columns(adapted=True, merged=False)
        found = side_by_side(model, names, sets, lambda given, _: measure(model, tokenizer, given, style="inst"))
    print(Report(names, found))
    rows: list[dict[str, Any]] = []
    for given, measured in found:
        floor = most_frequent(given.targets())
        for metric in ("accuracy", "f1"):
            scores = {column: round(measured[column].scores[metric], 2) for column in (BASE, ADAPTER)}
            rows.append({
                "model": Path(args.model).name, "task": given.name, "rows": len(given.rows), "metric": metric,
                "most_frequent_label": round(floor[metric], 2), **scores, "steps": args.steps, "lr": args.lr,
                "r": args.r, "seed": args.seed, "train_seconds": round(seconds),
            })  # fmt: skip
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
