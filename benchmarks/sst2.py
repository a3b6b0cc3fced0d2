"""SST-2 with a BERT-type model as a sequence classifier: LoRA at several ranks beside full fine-tuning.

The folder has train.tsv and dev.tsv, a sentence and 0 or 1 in each line, without a header. Each side's learning rate
is chosen by held-out rows of the training file, with the first seed; then all seeds run at it, and dev.tsv is scored.
Every side has the same rows in the same order, the same steps, schedule and head, which trains whole.

    python benchmarks/sst2.py MODEL --rows SST2_FOLDER --out benchmarks/results/sst2.csv
"""

import argparse
import csv
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_csv

import lora
from lora import LoraConfig
from lora.data.encode import Encoded
from lora.data.order import batches
from lora.train.base import load_tokenizer
from lora.train.classify import (
    LabelCollator,
    accuracy_f1,
    class_logits,
    encode_labelled,
    load_classifier,
    pad_id,
    with_head,
)

SIDES: dict[str, tuple[int, list[float]]] = {  # rank (0: all weights train) and the rates to try
    "full": (0, [5e-5, 1e-4, 2e-4]),
    "lora r=8": (8, [5e-4, 1e-3, 2e-3]),
    "lora r=16": (16, [5e-4, 1e-3, 2e-3]),
}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {"text": text, "label": label} for text, label in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]


def steps(rows: list[Encoded], batch_size: int, passes: int, seed: int) -> Iterator[list[Encoded]]:
    lengths = [len(row["input_ids"]) for row in rows]
    for number in range(passes):
        for batch in batches(lengths, batch_size, seed, number, True):
            yield [rows[i] for i in batch]


def trained(args: Any, tokenizer: Any, names: list[str], rank: int, rate: float, seed: int, rows: list[Encoded]) -> Any:
    """A fresh classifier after its run; a tenth of the steps warms up, then the rate falls to zero."""
    torch.manual_seed(seed)
    model = load_classifier(args.model, names, tokenizer, torch.float32)
    if rank:
        lora.inject(model, config=with_head(LoraConfig(r=rank, alpha=2 * rank, targets="all-linear"), model))
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    order = list(steps(rows, args.batch_size, args.passes, seed))
    warm = max(1, len(order) // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, (len(order) - n) / (len(order) - warm))
    )
    collate = LabelCollator(pad_id(model, tokenizer))
    for batch in order:
        model(**collate(batch)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def scored(model: Any, tokenizer: Any, rows: list[Encoded]) -> dict[str, float]:
    found = class_logits(model, rows, pad_id(model, tokenizer)).argmax(1).tolist()
    return accuracy_f1(found, [row["labels"][0] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=Path, required=True, help="folder of train.tsv and dev.tsv")
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=int, default=3, help="so many of each side's rates are tried")
    parser.add_argument("--out", type=Path, default=RESULTS / "sst2.csv")
    args = parser.parse_args()

    tokenizer, names = load_tokenizer(args.model), ["0", "1"]
    rows = read(args.rows / "train.tsv")
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    picked = encode_labelled([rows[i] for i in shuffled[: args.train + args.held_out]], tokenizer, 128, names).rows
    train, held_out = picked[: args.train], picked[args.train :]
    dev = encode_labelled(read(args.rows / "dev.tsv"), tokenizer, 128, names).rows
    results: list[dict[str, Any]] = []
    for side, (rank, rates) in SIDES.items():
        by_rate: dict[float, tuple[float, Any, float]] = {}
        for rate in rates[: args.rates]:
            start = time.perf_counter()
            model = trained(args, tokenizer, names, rank, rate, 0, train)
            seconds = time.perf_counter() - start
            by_rate[rate] = (scored(model, tokenizer, held_out)["accuracy"], model, seconds)
            print(f"{side}, rate {rate:g}: held-out accuracy {by_rate[rate][0]:.2f}, {seconds:.0f} s", flush=True)
        rate = max(by_rate, key=lambda each: by_rate[each][0])
        for seed in range(args.seeds):
            start = time.perf_counter()
            model = by_rate[rate][1] if seed == 0 else trained(args, tokenizer, names, rank, rate, seed, train)
            seconds = by_rate[rate][2] if seed == 0 else time.perf_counter() - start
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            scores = {name: round(value, 2) for name, value in scored(model, tokenizer, dev).items()}
            results.append(
                {"side": side, "lr": rate, "seed": seed, "trained": count, **scores, "seconds": round(seconds)}
            )
            print(results[-1], flush=True)
            write_csv(args.out, results)
    for side in SIDES:
        found = [row["accuracy"] for row in results if row["side"] == side]
        print(f"{side}: {statistics.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
