"""`lora train` end to end beside the bare step of benchmarks/quantized.py, in one process: Llama-2-7B's shape.

    PYTHONPATH=src python benchmarks/train_job.py --csv out.csv                # all cases, one process each
    PYTHONPATH=src python benchmarks/train_job.py --one "nf4 4 2048 offload"
    PYTHONPATH=src python benchmarks/train_job.py --one "none 2 64" --shape tiny   # here, without a card

A case is: the base's quantization, rows, tokens of a row, and words: offload, qv (r=8 on q and v; else r=16 on all
linears), packed (rows of 512 tokens, laid into packs of so many). The base has random weights and is saved quantized;
the job reads it from disk with its rows, trains, and writes what every run writes. Its rate is that of its
metrics.jsonl, from the fourth step to the last but one; the bare step takes ids of the same
shape (one row of 512 tokens where the job packs), before the job and after it.
"""

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import quantized
from common import in_processes, print_result, quiet_peers

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128}  # fmt: skip
CASES = [
    "nf4 4 2048 offload",
    "int8 4 2048 offload",
    "nf4 4 2048",
    "int8 4 2048",
    "nf4 1 512 qv",
    "nf4 1 8192 qv packed",
]
STEPS, SKIPPED = 20, 3


def save_base(folder: Path, kind: str, shape: str) -> None:
    """A base of random weights with its tokenizer, as a user has it on disk."""
    import torch
    from on_gpu import save_tokenizer
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

    if shape == "tiny":
        config = LlamaConfig(**TINY, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    else:
        model = quantized.base_model(shape, kind)
        four = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
        kinds: dict[str, dict[str, Any]] = {"nf4": {"load_in_4bit": True, **four}, "int8": {"load_in_8bit": True}}
        model.config.quantization_config = BitsAndBytesConfig(**kinds[kind])
        model.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
    save_tokenizer(folder)


def recipe_of(a: argparse.Namespace, folder: Path) -> Any:
    """The job's recipe; its rows, of random letters, are written here."""
    from lora.train.recipe import Recipe

    kind, rows, tokens, *words = a.one.split()
    rows, tokens = int(rows), int(tokens)
    length = 512 if "packed" in words else tokens
    random.seed(0)
    letters = [chr(33 + i) for i in range(90)]
    count = STEPS * rows * (tokens // length)
    with open(folder / "rows.jsonl", "w") as file:
        for _ in range(count):  # one token of each row is the stop token
            file.write(json.dumps({"text": "".join(random.choices(letters, k=length - 1))}) + "\n")
    targets = ["q_proj", "v_proj"] if "qv" in words else quantized.TARGETS
    return Recipe.of(
        model=str(folder / "base"), data=str(folder / "rows.jsonl"), out=str(folder / "out"), quantize=kind,
        r=8 if "qv" in words else 16, targets=targets, batch_size=rows, max_length=tokens, packing="packed" in words,
        max_steps=STEPS, liger=a.shape != "tiny", gradient_checkpointing=a.shape != "tiny", offload="offload" in words,
        check=False, warmup_steps=0, save_every=STEPS,
    )  # fmt: skip


def bare(a: argparse.Namespace, recipe: Any) -> Any:
    """A function that times the bare step of the same shape: tokens a second."""
    import torch
    from on_gpu import training_step

    import lora
    from lora.train.base import load_base, pick_dtype

    if recipe.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = load_base(recipe.model, pick_dtype(recipe.dtype), recipe.quantize)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device) if recipe.quantize == "none" else None
    lora.inject(model, config=recipe.adapter())
    lora.prepare(model, checkpointing="offload" if recipe.offload else recipe.gradient_checkpointing)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    rows, tokens = int(a.one.split()[1]), int(a.one.split()[2])
    tokens = 512 if recipe.packing else tokens
    ids = torch.randint(3, 90, (rows, tokens), device=device)
    step = training_step(model, optimizer, ids, contextlib.nullcontext())

    def rate() -> float:
        for _ in range(SKIPPED):
            step()
        torch.cuda.synchronize() if device == "cuda" else None
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize() if device == "cuda" else None
        return rows * tokens * STEPS / (time.perf_counter() - start)

    return rate


def measure(a: argparse.Namespace) -> dict[str, Any]:
    import torch
    from rich.console import Console

    from lora.train.job import run

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        save_base(folder / "base", a.one.split()[0], a.shape)
        recipe = recipe_of(a, folder)
        rate = bare(a, recipe)
        before = rate()
        start = time.perf_counter()
        result = run(recipe, console=Console(stderr=True))
        whole = time.perf_counter() - start
        lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line][SKIPPED:-1]
        after = rate()
    tokens = sum(line["tokens"] for line in steps[1:])
    job = tokens / (steps[-1]["seconds"] - steps[0]["seconds"])
    step = statistics.median(line["tokens_per_second"] for line in steps[1:])
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "case": a.one, "card": name, "tokens_per_step": steps[0]["tokens"],
        "bare_before": round(before, 1), "bare_after": round(after, 1), "job": round(job, 1),
        "job_median_step": round(step, 1), "ratio": round(job / statistics.mean([before, after]), 4),
        "job_seconds_whole": round(whole, 1), "job_seconds_paused": result.metrics["paused_seconds"],
    }  # fmt: skip


def shown(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:24} bare {row['bare_before']:9.1f} and {row['bare_after']:9.1f} tokens/s, job {row['job']:9.1f} "
        f"(median step {row['job_median_step']:9.1f}): {row['ratio']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="one case, in this process")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--shape", default="7b", choices=["7b", "tiny"])
    parser.add_argument("--csv")
    a = parser.parse_args()
    quiet_peers("")
    if a.one:
        print_result(measure(a))
        return
    chosen = [["--one", case] for case in CASES if a.only in case]
    in_processes(sys.argv[0], chosen, shown, a.csv, seconds=170)


if __name__ == "__main__":
    main()
