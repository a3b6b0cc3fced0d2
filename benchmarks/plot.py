"""Draws docs/train_step.png and docs/lora_linear.png from benchmarks/results.   pip install 'lora-torch[train]'"""

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


WAYS = {  # column, name, colour
    "ours_ratio": ("lora", "#1f6feb"),
    "plain_ratio": ("composition over cuBLAS", "#8a8f98"),
    "peft_bf16_ratio": ("PEFT, A and B in bf16", "#e3b98a"),
    "peft_default_ratio": ("PEFT, default", "#d29a5b"),
}


def lora_linear() -> None:
    with (ROOT / "benchmarks/results/lora_linear_h200.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["r"] == "16"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.2), sharey=True)
    for axis, dropout in zip(axes, ("0.0", "0.05"), strict=True):
        cases = [row for row in rows if row["dropout"] == dropout]
        for i, (column, (name, colour)) in enumerate(WAYS.items()):
            values = [float(row[column]) for row in cases]
            bars = axis.barh([k + 0.2 * i for k in range(len(cases))], values, height=0.18, color=colour, label=name)
            axis.bar_label(bars, [f"{v:.2f}" for v in values], padding=3, fontsize=8)
        axis.axvline(1, color="#444444", linewidth=0.8)
        axis.set_title("no dropout" if dropout == "0.0" else f"dropout {dropout}", loc="left")
        axis.set_yticks([k + 0.3 for k in range(len(cases))], [row["case"] for row in cases])
        axis.set_xlim(0, 6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    title = "time of a linear, forward and backward, over the frozen linear's; r=16, 8192 tokens, one H200"
    figure.suptitle(title, x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="lower center", ncols=len(WAYS))
    figure.savefig(ROOT / "docs/lora_linear.png", dpi=110)


def train_step() -> None:
    with (ROOT / "benchmarks/results/train_step_h200.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["checkpointing"] == "False"][:-1]  # the floor is there twice
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
    train_step()
    lora_linear()
