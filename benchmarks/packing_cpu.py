"""Tokens a second of rows padded as they come, padded by length, and packed, on the example base and a CPU.

    python benchmarks/packing_cpu.py

The same 128 short rows, forward and backward with an adapter on all linears, in turns (a minute on two cores). Padding
is not counted as tokens. Writes results/packing_cpu.csv.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, interleaved, spread, write_csv

ROOT = Path(__file__).resolve().parents[1]
BATCH, CAPACITY, ROWS = 8, 512, 128


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    import lora
    from lora.data.collate import PackingCollator, PaddingCollator
    from lora.data.encode import encode_rows
    from lora.data.order import batches
    from lora.data.packs import packed
    from lora.data.rows import read_rows
    from lora.data.template import PromptTemplate
    from lora.train.base import load_base, load_tokenizer
    from lora.train.leaks import check_packing
    from lora.train.losses import token_weighted

    name = str(ROOT / "examples/tiny-llama-8m")
    rows = encode_rows(
        read_rows(str(ROOT / "examples/e2e/train.jsonl"))[:ROWS], PromptTemplate(load_tokenizer(name)), CAPACITY
    ).rows
    lengths = [len(row["input_ids"]) for row in rows]
    model = lora.inject(load_base(name, torch.float32), r=16, targets="all-linear").train()
    check_packing(model)
    packs = packed(lengths, CAPACITY)
    padding, packing = PaddingCollator(0), PackingCollator(0)
    ways = {
        "padded": [padding([rows[i] for i in step]) for step in batches(lengths, BATCH, 0, 0, group=False)],
        "by length": [padding([rows[i] for i in step]) for step in batches(lengths, BATCH, 0, 0, group=True)],
        "packed": [packing([[rows[i] for i in pack]]) for pack in packs],
    }

    def a_pass(steps: list[dict[str, Any]]) -> Callable[[], None]:
        def run() -> None:
            for batch in steps:
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                token_weighted(model(**inputs), batch["labels"]).backward()
            model.zero_grad()

        return run

    seconds = interleaved({way: a_pass(steps) for way, steps in ways.items()}, rounds=5, inner=1)
    table = []
    for way, steps in ways.items():
        low, median, high = spread([sum(lengths) / each for each in seconds[way]])
        room = sum(batch["input_ids"].numel() for batch in steps)
        table.append(
            {
                "rows": way, "passes": len(steps), "tokens": sum(lengths), "padding": f"{1 - sum(lengths) / room:.3f}",
                "tokens_per_second_p20": round(low), "median": round(median), "p80": round(high),
            }
        )  # fmt: skip
        print(table[-1], flush=True)
    write_csv(RESULTS / "packing_cpu.csv", table)


if __name__ == "__main__":
    main()
