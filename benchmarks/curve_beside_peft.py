"""The loss of `lora train` beside that of PEFT under transformers' Trainer: the same A, B, rows, order and settings.

    python benchmarks/curve_beside_peft.py

On a CPU in fp32, over 200 steps of short rows on the example base (some 3 minutes on two cores). Writes a row for each
step to results/curve_beside_peft.csv and fails where the two are more than 1e-3 apart.
"""

import argparse
import json
import os
import tempfile
from itertools import chain, count
from pathlib import Path
from typing import Any

from common import RESULTS, write_csv

ROOT = Path(__file__).resolve().parents[1]
WITHIN = 1e-3


def losses_of_ours(recipe: Any) -> list[float]:
    """Of each step, as `lora train` reports them."""
    from lora.train import run

    run(recipe)
    lines = (Path(recipe.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [step["loss"] for step in map(json.loads, lines) if "loss" in step]


def losses_of_peft(recipe: Any, folder: Path) -> list[float]:
    """Of each step, by PEFT and a Trainer that knows nothing of us, from the recipe's A and rows in its order."""
    import torch
    import transformers
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    import lora
    from lora.data.encode import encode_rows
    from lora.data.order import batches
    from lora.data.rows import read_rows
    from lora.data.template import PromptTemplate
    from lora.train.base import load_base, load_tokenizer

    transformers.set_seed(recipe.seed)
    first = lora.inject(load_base(recipe.model, torch.float32), config=recipe.adapter())
    lora.save(first, folder / "first")
    tokenizer = load_tokenizer(recipe.model)
    rows = encode_rows(read_rows(recipe.data), PromptTemplate(tokenizer), recipe.max_length).rows
    lengths, step = [len(row["input_ids"]) for row in rows], recipe.batch_size * recipe.grad_accum
    assert len(rows) % step == 0, "a pass must be whole steps, since Trainer is given all passes as one"
    passes = (batches(lengths, step, recipe.seed, epoch, recipe.group_by_length) for epoch in count())
    order: list[int] = []
    while len(order) < step * recipe.max_steps:
        order += chain.from_iterable(next(passes))

    noted: list[float] = []

    class Noting(Trainer):  # type: ignore[misc]
        """Trainer, whose own log rounds a loss to four digits."""

        def training_step(self, *arguments: Any, **settings: Any) -> Any:
            loss = super().training_step(*arguments, **settings)
            noted.append(float(loss))
            return loss

    base = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "first", is_trainable=True)
    settings = TrainingArguments(
        str(folder), max_steps=recipe.max_steps, per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.grad_accum, learning_rate=recipe.lr, lr_scheduler_type="constant",
        max_grad_norm=recipe.max_grad_norm, train_sampling_strategy="sequential", seed=recipe.seed, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    Noting(
        model, settings, train_dataset=[rows[row] for row in order], data_collator=DataCollatorForSeq2Seq(tokenizer)
    ).train()
    parts = recipe.grad_accum
    return [sum(noted[start : start + parts]) for start in range(0, len(noted), parts)]


def recipe_of(model: str, data: str, folder: Path, **changes: Any) -> Any:
    """No dropout, whose random numbers the two draw in another order, and a rate that the two schedules agree on."""
    from lora.train import Recipe

    settings = {
        "max_steps": 200, "batch_size": 4, "grad_accum": 2, "lr": 2e-3, "schedule": "constant", "warmup_steps": 0,
        "r": 8, "targets": "all-linear", "dropout": 0.0, "max_length": 128, "seed": 3, "check": False, "dtype": "fp32",
        **changes,
    }  # fmt: skip
    return Recipe.of(model=model, data=data, out=str(folder / "ours"), **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = (ROOT / "examples/e2e/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:800]
        (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")  # 100 steps a pass
        recipe = recipe_of(
            str(ROOT / "examples/tiny-llama-8m"), str(folder / "rows.jsonl"), folder, max_steps=arguments.steps
        )
        ours, theirs = losses_of_ours(recipe), losses_of_peft(recipe, folder)
    assert len(ours) == len(theirs) == arguments.steps
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    numbers = enumerate(zip(ours, theirs, apart, strict=True), 1)
    write_csv(
        RESULTS / "curve_beside_peft.csv",
        [{"step": n, "lora": f"{a:.7f}", "peft": f"{b:.7f}", "apart": f"{c:.2e}"} for n, (a, b, c) in numbers],
    )
    print(
        f"loss {ours[0]:.4f} to {ours[-1]:.4f}; at most {max(apart):.2e} apart, at step {apart.index(max(apart)) + 1}"
    )
    if not max(apart) <= WITHIN:
        raise SystemExit(f"more than {WITHIN:g} apart")


if __name__ == "__main__":
    main()
