"""Draws docs/train_step.png from benchmarks/results/train_step_h200.csv.   pip install 'lora-torch[docs]'"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
NAMES = {
    "frozen+liger": "frozen + Liger (floor)",
    "lora+liger": "lora + Liger",
    "peft+liger": "PEFT + Liger",
    "unsloth": "Unsloth",
    "frozen": "frozen (floor)",
    "lora": "lora",
    "peft": "PEFT",
}


def main() -> None:
    with (ROOT / "benchmarks/results/train_step_h200.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["checkpointing"] == "False"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    labels = [NAMES[r["variant"]] + (", dropout 0.05" if float(r["dropout"]) else "") for r in rows]
    colours = [
        "#8a8f98" if "frozen" in r["variant"] else "#1f6feb" if "lora" in r["variant"] else "#d29a5b" for r in rows
    ]
    for axis, key, title in ((left, "ms", "one step, ms"), (right, "peak_gib", "peak memory, GiB")):
        values = [float(r[key]) for r in rows]
        bars = axis.barh(labels, values, color=colours)
        axis.bar_label(bars, [f"{v:.1f}" for v in values], padding=3)
        axis.set_title(title, loc="left")
        axis.set_xlim(0, max(values) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    figure.suptitle(
        "8 layers of Llama-3.1-8B's width, r=16 on all linears, 4 x 2048 tokens, bf16, one H200", x=0.01, ha="left"
    )
    figure.tight_layout()
    figure.savefig(ROOT / "docs/train_step.png", dpi=110)


if __name__ == "__main__":
    main()
