"""E2E NLG: LoRA at several ranks and a LLaMA-Adapter beside full fine-tuning, each side's learning rate swept.

    python benchmarks/e2e.py MODEL [MODEL ...] --train examples/e2e/train.jsonl --test examples/e2e/test.jsonl

Each side's rate is chosen by the loss of held-out training rows, with the first seed; then all seeds run at it. All
sides have the same rows in the same order, the same steps, warm-up and decay. Answers are greedy; BLEU is sacrebleu's,
lower-cased, against all references of a meaning; ROUGE-L is the mean F1 with the nearest one. One row a run goes to
the CSV, also of the runs that choose a rate. `--time` times a step of each side, alone, instead. `--draw` makes the
picture of a CSV that is there.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, read_csv, write_csv

import lora
from lora.data.collate import PaddingCollator
from lora.data.encode import Encoded, encode_rows
from lora.data.order import batches
from lora.data.rows import read_rows
from lora.data.template import PromptTemplate
from lora.evaluation.scores import bleu, rouge_l
from lora.train.base import load_base, load_tokenizer
from lora.train.generation import generate, row_prompts
from lora.train.losses import held_out_loss, token_weighted

RATES = {"full": [2e-4, 5e-4, 1e-3, 2e-3], "lora": [1e-3, 2e-3, 4e-3, 8e-3], "prompts": [3e-3, 1e-2, 3e-2]}
SIDES = {"full": 0, "lora r=4": 4, "lora r=8": 8, "lora r=16": 16, "prompts": -1}  # ranks; 0: all weights train


def trained(args: argparse.Namespace, name: str, rank: int, rate: float, seed: int, rows: list[Encoded]) -> Any:
    """A fresh model after its run: 20 steps of warm-up, then a linear decay to zero."""
    torch.manual_seed(seed)
    model = load_base(name, torch.float32).to(args.device)
    if rank < 0:  # 10 prompts in each layer
        lora.llama_adapter.inject(model)
    elif rank:
        lora.inject(model, r=rank, alpha=2 * rank, targets="all-linear")
    else:
        model.requires_grad_(True)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    lengths = [len(row["input_ids"]) for row in rows]
    order = [
        batch for epoch in range(args.passes) for batch in batches(lengths, args.batch_size, seed, epoch, args.group)
    ]
    order = order[: args.steps]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / 20, (len(order) - n) / max(1, len(order) - 20))
    )
    collate = PaddingCollator(0)
    times = []
    for batch in order:
        start = time.perf_counter()
        inputs = {key: value.to(args.device) for key, value in collate([rows[i] for i in batch]).items()}
        labels = inputs.pop("labels")
        loss = token_weighted(model(**inputs), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if args.time:
            loss.item()  # waits for the step
            times.append(time.perf_counter() - start)
    if args.time:
        print(f"{Path(name).name}, rank {rank}: {statistics.median(times[20:]) * 1e3:.1f} ms a step", flush=True)
    return model.eval()


def held_out(args: argparse.Namespace, model: Any, rows: list[Encoded]) -> float:
    collate = PaddingCollator(0)
    parts = [rows[start : start + 32] for start in range(0, len(rows), 32)]
    return held_out_loss(model, ({k: v.to(args.device) for k, v in collate(part).items()} for part in parts))


def measured(args: argparse.Namespace, name: str, side: str, rate: float, seed: int, data: dict[str, Any]) -> Any:
    """The model of one run and its row of the table, with no scores of answers yet."""
    start = time.perf_counter()
    model = trained(args, name, SIDES[side], rate, seed, data["train"])
    row = {
        "base": Path(name).name, "side": side, "passes": args.passes, "grouped": int(args.group), "lr": rate,
        "seed": seed,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(time.perf_counter() - start, 1),
        "held_out_loss": round(held_out(args, model, data["held"]), 4),
    }  # fmt: skip
    print(row, flush=True)
    return model, row


def answered(args: argparse.Namespace, model: Any, tokenizer: Any, test: list[dict[str, Any]]) -> dict[str, float]:
    size = 60 if args.device == "cpu" else 320
    answers = generate(model, tokenizer, row_prompts(test), max_new_tokens=64, batch_size=size)
    references = [[text.lower() for text in row["references"]] for row in test]
    lower = [answer.lower() for answer in answers]
    return {"bleu": round(bleu(lower, references), 2), "rouge_l": round(rouge_l(lower, references), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--train", default="examples/e2e/train.jsonl")
    parser.add_argument("--test", default="examples/e2e/test.jsonl")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="at most so many")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=int, default=4, help="so many of each side's rates are tried")
    parser.add_argument("--group", action="store_true", help="rows of like length share a step")
    parser.add_argument("--time", action="store_true", help="time 60 steps of each side, and stop")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "e2e.csv")
    parser.add_argument("--draw", type=Path, help="draw the CSV into this file, and stop")
    args = parser.parse_args()
    if args.draw:
        draw(read_csv(args.out), args.draw)
        return
    results: list[dict[str, Any]] = []
    for name in args.models:
        tokenizer = load_tokenizer(name)
        rows = encode_rows(read_rows(args.train), PromptTemplate(tokenizer), 512).rows
        data = {"train": rows[args.held_out :], "held": rows[: args.held_out]}
        test = read_rows(args.test)
        if args.time:
            args.steps = 60
            for side in args.sides:
                trained(args, name, SIDES[side], 1e-4, 0, data["train"])
            continue
        for side in args.sides:
            tried = {}
            for rate in RATES[side.split()[0]][: args.rates]:
                tried[rate] = measured(args, name, side, rate, 0, data)
                results.append({**tried[rate][1], "chosen": 0})
                write_csv(args.out, results)
            rate = min(tried, key=lambda each: tried[each][1]["held_out_loss"])
            for seed in range(args.seeds):
                model, row = tried[rate] if seed == 0 else measured(args, name, side, rate, seed, data)
                results.append({**row, "chosen": 1, **answered(args, model, tokenizer, test)})
                print(results[-1], flush=True)
                write_csv(args.out, results)
    for base, side in dict.fromkeys((row["base"], row["side"]) for row in results):
        found = [row["bleu"] for row in results if row["chosen"] and (row["base"], row["side"]) == (base, side)]
        print(f"{base}, {side}: BLEU {statistics.mean(found):.1f} ({min(found):.1f} to {max(found):.1f})")


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """BLEU of each side and base after one pass, rows as they come: a dot a seed, a line at the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [row for row in rows if (row["chosen"], row["passes"], row["grouped"]) == ("1", "1", "0")]
    bases = list(dict.fromkeys(row["base"] for row in chosen))
    figure, axes = plt.subplots(1, len(bases), figsize=(5 * len(bases), 3.6), sharey=True, squeeze=False)
    for axis, base in zip(axes[0], bases, strict=True):
        sides = list(dict.fromkeys(row["side"] for row in chosen if row["base"] == base))
        for place, side in enumerate(sides):
            values = [float(row["bleu"]) for row in chosen if (row["base"], row["side"]) == (base, side)]
            colour = "#8a8f98" if side == "full" else "#1f6feb"
            axis.plot([place] * len(values), values, "o", color=colour, alpha=0.6)
            axis.hlines(statistics.mean(values), place - 0.25, place + 0.25, color=colour, linewidth=2)
        axis.set_xticks(range(len(sides)), sides)
        axis.set_title(base, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("BLEU, a dot a seed")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
