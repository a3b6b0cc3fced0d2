"""A frozen language model answers what a picture shows, offline and on a CPU.

    python examples/llama_adapter/pictures.py            # some minutes on two cores: three seeds, two kinds of gates
    python examples/llama_adapter/pictures.py --smoke    # seconds: a few steps, no goal to reach

An 8-million-parameter Llama that has never seen a picture, an encoder that has never seen a label, both frozen; the
LLaMA-Adapter between them is all that trains. Two questions are asked of each held-out picture, and the same is done
with gates that start at random in place of zero. Exits non-zero where zero gates miss the goal.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from encoder import OUT, Pictures, encode, load_encoder, make_encoder, read_pictures, scales
from torch import Tensor

import lora

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-llama-8m"
WHICH, EVEN = "What does the picture show?", "Is the number in the picture even or odd?"
RATES = {"zero": 1e-2, "random": 1e-3}  # each the best of those in docs/llama_adapter.md (seed 0)
BATCH, WARM_UP, GOAL = 32, 20, 0.9


def asked(pictures: Pictures, digits: bool) -> list[tuple[int, str, str]]:
    """(picture, question, answer)"""
    names = [pictures.names[label] for label in pictures.labels.tolist()]
    rows = [(i, WHICH, name) for i, name in enumerate(names)]
    parity = [(i, EVEN, ("even", "odd")[label % 2]) for i, label in enumerate(pictures.labels.tolist())]
    return [*rows, *parity] if digits else rows


class Asker:
    """Rows as tokens, and a model's answers."""

    def __init__(self, features: Tensor) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.features = features

    def prompt(self, question: str) -> list[int]:
        said = [{"role": "user", "content": question}]
        ids: list[int] = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        return ids

    def batch(self, rows: list[tuple[int, str, str]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(features, tokens, mask, labels): the loss falls on the answer and the token that ends it."""
        texts = [(self.prompt(q), self.tokenizer(f"{a}{self.tokenizer.eos_token}").input_ids) for _, q, a in rows]
        longest = max(len(prompt) + len(answer) for prompt, answer in texts)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (prompt, answer) in enumerate(texts):
            end = len(prompt) + len(answer)
            ids[i, :end], mask[i, :end] = torch.tensor(prompt + answer), 1
            labels[i, len(prompt) : end] = torch.tensor(answer)
        return self.features[[i for i, _, _ in rows]], ids, mask, labels

    @torch.no_grad()
    def answers(self, model: Any, rows: list[tuple[int, str, str]], batch: int = 128) -> list[str]:
        """What the model says to rows that ask one question."""
        found = []
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            ids = torch.tensor([self.prompt(question) for _, question, _ in part])
            with lora.llama_adapter.condition(model, self.features[[i for i, _, _ in part]]):
                made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
            found += self.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in found]


def train(asker: Asker, rows: list[tuple[int, str, str]], gates: str, seed: int, options: Any) -> Any:
    """A model with an adapter that was trained on rows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    torch.manual_seed(seed)
    layers = 6 if options.fusion == "early" else None  # of eight: two read the picture
    lora.llama_adapter.inject(model, layers=layers, features=asker.features.shape[1:], fusion=options.fusion)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if gates == "random":
        for name, parameter in trained.items():
            if name.endswith(".gate"):
                torch.nn.init.normal_(parameter)
    rate = options.rate or RATES[gates] / (3 if options.fusion == "early" else 1)
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.0)
    factor = lambda i: min(1, (i + 1) / WARM_UP) * (1 - i / options.steps)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(options.steps):
        chosen = [rows[i] for i in torch.randint(len(rows), (BATCH,)).tolist()]
        features, ids, mask, labels = asker.batch(chosen)
        with lora.llama_adapter.condition(model, features):
            loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model


def measure(asker: Asker, model: Any, rows: list[tuple[int, str, str]]) -> dict[str, float]:
    """The share of the answers that are right to the letter, by question."""
    found = {}
    for question in dict.fromkeys(question for _, question, _ in rows):
        its = [row for row in rows if row[1] == question]
        said = asker.answers(model, its)
        found[question] = sum(answer == row[2] for answer, row in zip(said, its, strict=True)) / len(its)
    return found


def draw(results: list[dict[str, Any]], chance: dict[str, float], file: Path) -> None:
    """Held-out accuracy by question: a bar is the mean of the seeds, a point is one of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(chance), figsize=(3.6 * len(chance), 3.2), sharey=True, squeeze=False)
    for axis, (question, level) in zip(axes[0], chance.items(), strict=True):
        for place, gates in enumerate(("zero", "random")):
            values = [100 * r["accuracy"][question] for r in results if r["gates"] == gates]
            axis.bar(place, sum(values) / len(values), color=("#2a6f97", "#c9a227")[place], width=0.6)
            axis.scatter([place] * len(values), values, color="black", s=12, zorder=3)
            axis.annotate(f"{sum(values) / len(values):.1f}", (place, sum(values) / len(values) + 3), ha="center")
        axis.axhline(100 * level, color="gray", linestyle="--", linewidth=1)
        axis.annotate("chance", (1.32, 100 * level + 1.5), ha="right", color="gray", fontsize=8)
        axis.set_title(question, fontsize=9)
        axis.set_xticks([0, 1], ["gates at zero", "random gates"])
        axis.set_ylim(0, 112)
    axes[0][0].set_ylabel("held-out answers that are right, %")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", help="a folder with a folder of pictures for each class; else digits")
    parser.add_argument("--out", default=str(OUT), help="where the adapter, the numbers and the picture go")
    parser.add_argument("--encoder", help="what encoder.py wrote for these pictures; else one is made")
    parser.add_argument("--fusion", choices=["late", "early"], default="late", help="where the picture enters")
    parser.add_argument("--gates", nargs="+", choices=["zero", "random"], default=["zero", "random"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--passes", type=int, default=40, help="of the encoder over the pictures")
    parser.add_argument("--rate", type=float, help="of the adapter")
    parser.add_argument("--smoke", action="store_true", help="a few steps and pictures")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.steps, options.passes = 1, 2, 1
    out, started = Path(options.out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)

    pictures = read_pictures(options.pictures)
    print(f"1. an encoder of {pictures.trained} pictures, without their labels", flush=True)
    known = options.encoder is not None
    encoder = load_encoder(pictures, Path(options.encoder)) if known else make_encoder(pictures, options.passes)
    tokens = encode(encoder, pictures.pixels)
    asker = Asker(tokens if options.fusion == "early" else scales(tokens))
    rows = asked(pictures, digits=options.pictures is None)
    held_out = [row for row in rows if row[0] >= pictures.trained][:: 40 if options.smoke else 1]
    seen = [row for row in rows if row[0] < pictures.trained]
    chance = {WHICH: 1 / len(pictures.names), EVEN: 0.5}
    chance = {question: chance[question] for question in dict.fromkeys(row[1] for row in rows)}

    print(f"2. an adapter between the encoder and {MODEL.name}, all else frozen", flush=True)
    results = []
    for seed in range(options.seeds):
        for gates in options.gates:
            model = train(asker, seen, gates, seed, options)
            accuracy = measure(asker, model, held_out)
            results.append({"gates": gates, "seed": seed, "accuracy": accuracy})
            print(f"gates {gates}, seed {seed}: " + ", ".join(f"{q} {a:.1%}" for q, a in accuracy.items()), flush=True)
            if gates == "zero":
                lora.save(model, out / "adapter")
            (out / "pictures.json").write_text(json.dumps({"chance": chance, "runs": results}, indent=2) + "\n")
    if set(options.gates) == {"zero", "random"}:
        draw(results, chance, out / "pictures.png")
    least = min(r["accuracy"][WHICH] for r in results if r["gates"] == options.gates[0])
    print(f"Done in {time.perf_counter() - started:.0f} s. The numbers are in {out}/pictures.json")
    if options.pictures is None and not options.smoke and options.gates[0] == "zero" and least < GOAL:
        raise SystemExit(f"{least:.1%} of the held-out digits were named; the goal is {GOAL:.0%}")


if __name__ == "__main__":
    main()
