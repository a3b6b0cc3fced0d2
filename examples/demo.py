"""The whole job on a laptop's CPU, offline: train an adapter, measure it, inspect it, merge it.

    python examples/demo.py            # about 4 minutes on two cores
    python examples/demo.py --smoke    # seconds: a few steps, no goal to reach

The base is an 8-million-parameter Llama, the task E2E NLG: a restaurant's facts into a sentence. Every step is the
`lora` command as you would type it. Exits non-zero when BLEU or the facts miss the goal, or the merged model answers
otherwise.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "examples/tiny-llama-8m"
TRAIN, TEST = "examples/e2e/train.jsonl", "examples/e2e/test.jsonl"
SETTINGS = ["--r", "16", "--targets", "all-linear", "--lr", "2e-3"]
STEPS = ["--max-steps", "420", "--warmup-steps", "20"]
GOAL, NAMES, FACTS = 45.0, 0.95, 0.90  # BLEU after training; shares of the names and of the facts that are copied

# Offline; and threads that wait asleep, because spinning ones lose most of a machine that has other work.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}


def lora(*arguments: str) -> None:
    """Shows and runs one `lora` command; the demo ends when it fails."""
    print(f"\n$ lora {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "lora.cli", *arguments]
    finished = subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, **os.environ}, check=False)
    if finished.returncode != 0:
        sys.exit(f"lora {arguments[0]} failed with exit code {finished.returncode}")


def rows(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]


def bleu(path: str) -> float:
    """Corpus BLEU of the answers in a file, lower-cased, against all the references of each meaning."""
    import sacrebleu

    answered = rows(path)
    most = max(len(row["references"]) for row in answered)
    # sacrebleu wants one list per reference position; a meaning with fewer references has None there.
    references = [[(row["references"] + [None] * most)[i] for row in answered] for i in range(most)]
    return sacrebleu.corpus_bleu([row["generated"] for row in answered], references, lowercase=True).score


def copied(path: str) -> dict[str, tuple[int, int]]:
    """Of the names, neighbours and foods that the prompts give, how many stand in the answers, letter for letter."""
    counts = {}
    for fact in ("name", "near", "food"):
        given = [(f"{fact}: ", row) for row in rows(path) if f"{fact}: " in row["prompt"]]
        values = [(row["prompt"].split(mark)[1].split(" | ")[0], row["generated"]) for mark, row in given]
        counts[fact] = (sum(value.lower() in answer.lower() for value, answer in values), len(values))
    return counts


def show_scores(path: str, when: str) -> tuple[float, float, float]:
    """Prints and returns BLEU, the share of the names that were copied, and of all facts."""
    score, counts = bleu(path), copied(path)
    right, given = sum(right for right, _ in counts.values()), sum(given for _, given in counts.values())
    each = ", ".join(f"{fact} {right} of {given}" for fact, (right, given) in counts.items())
    print(f"{when:>6}: BLEU {score:4.1f}, facts copied {right} of {given} ({each})", flush=True)
    return score, counts["name"][0] / counts["name"][1], right / given


def few_rows(source: str, path: str, count: int) -> str:
    lines = (ROOT / source).read_text(encoding="utf-8").splitlines(keepends=True)
    (ROOT / path).write_text("".join(lines[:count]), encoding="utf-8")
    return path


def show_samples(path: str, count: int = 3) -> None:
    answered = rows(path)
    for row in answered[:: max(1, len(answered) // count)][:count]:
        print(f"\n  facts      {row['prompt']}\n  answer     {row['generated']}\n  reference  {row['references'][0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/demo", help="where the adapter, the merged model and the answers go")
    parser.add_argument(
        "--smoke", action="store_true", default=bool(os.environ.get("LORA_DEMO_SMOKE")), help="a few steps and rows"
    )
    options = parser.parse_args()
    out, smoke = str(options.out), bool(options.smoke)
    started = time.perf_counter()
    adapter, merged = f"{out}/adapter", f"{out}/merged"
    (ROOT / out).mkdir(parents=True, exist_ok=True)
    train = few_rows(TRAIN, f"{out}/train.jsonl", 48) if smoke else TRAIN
    test = few_rows(TEST, f"{out}/test.jsonl", 4) if smoke else TEST
    length = ["--max-new-tokens", "12" if smoke else "64", "--batch-size", "32"]

    print(f"1. {MODEL} before training, on {len(rows(test))} held-out meanings", flush=True)
    lora("generate", MODEL, "--input", test, "--output", f"{out}/before.jsonl", *length)
    show_scores(f"{out}/before.jsonl", "before")

    print(f"\n2. train on {train}", flush=True)
    steps = ["--max-steps", "3", "--warmup-steps", "1"] if smoke else [*STEPS]
    schedule = ["--batch-size", "4", "--grad-accum", "2", *steps, "--log-every", "20", "--force"]
    lora("train", "--model", MODEL, "--data", train, "--out", adapter, *SETTINGS, *schedule)

    print("\n3. the same meanings, with the adapter", flush=True)
    lora("generate", MODEL, "--adapter", adapter, "--input", test, "--output", f"{out}/after.jsonl", *length)
    show_samples(f"{out}/after.jsonl")
    show_scores(f"{out}/before.jsonl", "before")
    after, names, facts = show_scores(f"{out}/after.jsonl", "after")

    print("\n4. what is in the adapter", flush=True)
    lora("inspect", adapter)

    print("\n5. merge it into the base: a plain model, which answers the same", flush=True)
    lora("merge", MODEL, adapter, merged, "--dtype", "fp32")
    lora("generate", merged, "--input", test, "--output", f"{out}/merged.jsonl", *length)
    pairs = list(zip(rows(f"{out}/after.jsonl"), rows(f"{out}/merged.jsonl"), strict=True))
    same = sum(one["generated"] == other["generated"] for one, other in pairs)
    print(f"answers of the merged model that are the same, to the character: {same} of {len(pairs)}", flush=True)

    seconds = time.perf_counter() - started
    print(f"\nDone in {seconds:.0f} s. The adapter is in {adapter}, the merged model in {merged}. Next:")
    prompt = shlex.quote(rows(test)[0]["prompt"])
    print(f"  lora generate {MODEL} --adapter {adapter} --prompt {prompt}")
    print("  lora train --model ORG/MODEL --data YOUR_ROWS.jsonl --out my-adapter")
    failures = [] if same == len(pairs) else [f"{len(pairs) - same} answers of the merged model differ"]
    if not smoke and (after < GOAL or names < NAMES or facts < FACTS):
        goal = f"{GOAL}, {NAMES:.0%} and {FACTS:.0%}"
        failures.append(f"BLEU {after:.1f}, names {names:.0%}, facts {facts:.0%}: the goal is {goal}")
    if failures:
        sys.exit("; ".join(failures))


if __name__ == "__main__":
    main()
