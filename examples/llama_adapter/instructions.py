"""Instruction tuning of the small model that ships, at one budget: LLaMA-Adapter, its version 2, LoRA, all weights.

    python examples/llama_adapter/instructions.py                     # some minutes on two cores
    python examples/llama_adapter/instructions.py --data alpaca.json  # on rows of your own: instruction, input, output
    python examples/llama_adapter/instructions.py --smoke             # seconds

The rows that ship are those of examples/e2e as instructions: write a sentence of facts, list the facts of a sentence,
name the place of a sentence. Every way sees the same rows in the same order and is measured on the same held-out rows,
by the mean loss of an answer's token and by answers.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lora

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-llama-8m"
E2E = ROOT / "examples" / "e2e"
BATCH, WARM_UP, LONGEST = 8, 10, 256
# Each the best of the rates that docs/llama_adapter.md lists, by held-out loss after 80 steps (seed 0).
RATES = {"llama-adapter": 2e-1, "llama-adapter-v2": 3e-2, "lora": 3e-3, "full": 1e-3}


class Row(NamedTuple):
    """One row in Alpaca's form."""

    instruction: str
    input: str
    output: str


def instructions(meaning: str, sentence: str) -> list[Row]:
    """The three rows of a place's facts and a sentence that states them."""
    name = dict(fact.split(": ", 1) for fact in meaning.split(" | "))["name"]
    return [
        Row("Write one sentence that states these facts.", meaning, sentence),
        Row("List the facts of this sentence.", sentence, meaning),
        Row("What is the name of the place in this sentence?", sentence, name),
    ]


def shipped() -> tuple[list[Row], list[Row]]:
    """(rows to train on, held-out rows), of no place in common."""
    files = [E2E / "train.jsonl", E2E / "test.jsonl"]
    train, test = ([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files)
    pairs = [(row["prompt"], row["completion"]) for row in train]
    held_out = [(row["prompt"], row["references"][0]) for row in test]
    return [r for pair in pairs for r in instructions(*pair)], [r for pair in held_out for r in instructions(*pair)]


def given(path: str) -> tuple[list[Row], list[Row]]:
    """The rows of a file in Alpaca's form, of which a hundred, drawn at random, are held out."""
    found = [Row(r["instruction"], r.get("input", ""), r["output"]) for r in json.loads(Path(path).read_text("utf-8"))]
    random.Random(0).shuffle(found)
    return found[100:], found[:100]


class Text:
    """Rows as tokens."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def prompt(self, row: Row) -> list[int]:
        said = [{"role": "user", "content": "\n\n".join(filter(None, row[:2]))}]
        ids: list[int] = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        return ids

    def batch(self, rows: list[Row]) -> dict[str, Tensor]:
        """The loss falls on the answer and the token that ends it."""
        texts = [(self.prompt(r), self.tokenizer(f"{r.output}{self.tokenizer.eos_token}").input_ids) for r in rows]
        longest = min(LONGEST, max(len(prompt) + len(answer) for prompt, answer in texts))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (prompt, answer) in enumerate(texts):
            whole = (prompt + answer)[:longest]
            ids[i, : len(whole)], mask[i, : len(whole)] = torch.tensor(whole), 1
            labels[i, len(prompt) : len(whole)] = torch.tensor(whole[len(prompt) :])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    @torch.no_grad()
    def answer(self, model: Any, row: Row) -> str:
        ids = torch.tensor([self.prompt(row)])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        said: str = self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        return said.strip()

    @torch.no_grad()
    def loss(self, model: Any, rows: list[Row]) -> float:
        """The mean over all tokens of the answers."""
        total, count = 0.0, 0
        for start in range(0, len(rows), 16):
            batch = self.batch(rows[start : start + 16])
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + float(model(**batch, use_cache=False).loss) * tokens, count + tokens
        return total / count


def made(method: str) -> Any:
    """The model with what trains in it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    torch.manual_seed(0)
    if method == "llama-adapter":
        lora.llama_adapter.inject(model, prompt_length=10)
    elif method == "llama-adapter-v2":
        lora.llama_adapter.inject(model, prompt_length=10, train_norms=True, train_bias=True)
    elif method == "lora":
        lora.inject(model, r=16, alpha=32, targets="all-linear")
    return model


def train(model: Any, text: Text, rows: list[Row], steps: int, rate: float) -> float:
    """Train what the model lets train; the seconds that it took."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    order = random.Random(0)
    factor = lambda i: min(1, (i + 1) / WARM_UP) * (1 - i / steps)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    started = time.perf_counter()
    for _ in range(steps):
        model(**text.batch(order.sample(rows, BATCH)), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a JSON list of rows: instruction, input, output")
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--rate", type=float, help="of each method; else what was best")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a few steps and rows")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.samples = 2, 1
    rows, held_out = shipped() if options.data is None else given(options.data)
    held_out = held_out[:6] if options.smoke else held_out
    text, shown = Text(), held_out[:: max(1, len(held_out) // options.samples + 1)][: options.samples]

    base = made("full").eval()
    said = {row: [("before", text.answer(base, row))] for row in shown}
    print(f"before: held-out loss {text.loss(base, held_out):.3f}", flush=True)
    for method in options.methods:
        model, rate = made(method).train(), options.rate or RATES[method]
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        seconds = train(model, text, rows, options.steps, rate)
        loss = text.loss(model.eval(), held_out)
        print(f"{method}, rate {rate:g}, {count:,} trained: held-out loss {loss:.3f}, {seconds:.0f} s", flush=True)
        for row, answers in said.items():
            answers.append((method, text.answer(model, row)))
    for row, answers in said.items():
        print(f"\n{row.instruction}\n  {row.input}")
        for who, answer in [*answers, ("wanted", row.output)]:
            print(f"  {who:>13}: {answer}")


if __name__ == "__main__":
    main()
