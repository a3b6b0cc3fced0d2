"""`lora estimate` beside the peak that a card measures, on 21 configurations.

    PYTHONPATH=src python benchmarks/estimate.py --csv out.csv     # all, one process each
    PYTHONPATH=src python benchmarks/estimate.py --one 7           # one, here
    PYTHONPATH=src python benchmarks/estimate.py --estimates       # the estimates alone, without a card

The models have random weights, made on the card module by module and quantized for real, as in benchmarks/quantized.py;
a step is forward, backward and the optimizer, and the peak that of the second and third.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import quantized
import train_step
from common import in_processes, print_result, quiet_peers

SHAPES = {
    "8 layers": {**train_step.SHAPE, "num_hidden_layers": 8},
    "7b": {**quantized.SHAPES["7b"], "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
    "70b": {**quantized.SHAPES["70b"], "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
}
CHECKPOINTING, LIGER = {"gradient_checkpointing": True}, {"liger": True}
BOTH = {**CHECKPOINTING, **LIGER}
NF4, INT8, OFFLOAD, EIGHT = {"quantize": "nf4"}, {"quantize": "int8"}, {"offload": True}, {"optimizer": "adamw_8bit"}
QV = {"r": 8, "targets": ["q_proj", "v_proj"]}
CASES: list[tuple[str, int, int, dict[str, Any]]] = [  # shape, rows, tokens, settings
    ("8 layers", 4, 2048, LIGER),
    ("8 layers", 4, 2048, {**LIGER, "dropout": 0.05}),
    ("8 layers", 4, 2048, {}),
    ("8 layers", 4, 2048, BOTH),
    ("8 layers", 4, 2048, CHECKPOINTING),
    ("8 layers", 4, 2048, {**LIGER, "r": 64}),
    ("8 layers", 4, 2048, {**LIGER, "dora": True}),
    ("8 layers", 1, 2048, {}),
    ("8 layers", 16, 512, LIGER),
    ("8 layers", 3, 1001, {}),
    ("8 layers", 4, 2048, {**LIGER, **QV}),
    ("7b", 4, 2048, BOTH),
    ("7b", 4, 2048, {**BOTH, **NF4, **OFFLOAD}),
    ("7b", 4, 2048, {**BOTH, **NF4}),
    ("7b", 4, 2048, {**BOTH, **INT8, **OFFLOAD}),
    ("7b", 4, 2048, {**BOTH, **INT8}),
    ("7b", 4, 2048, {**CHECKPOINTING, **NF4}),
    ("7b", 1, 512, {**BOTH, **NF4, **QV}),
    ("7b", 1, 512, {**BOTH, **NF4, **EIGHT, **QV}),
    ("70b", 1, 2048, {**BOTH, **NF4, **OFFLOAD}),
    ("70b", 1, 2048, {**BOTH, **NF4, **OFFLOAD, **EIGHT, "r": 64}),
]


def recipe_of(number: int, folder: Path) -> Any:
    from transformers import LlamaConfig

    from lora.train.recipe import Recipe

    shape, rows, tokens, settings = CASES[number]
    file = folder / f"{number}.json"
    LlamaConfig(**{"tie_word_embeddings": False, **SHAPES[shape]}).to_json_file(file, use_diff=False)
    fields = {"r": 16, "targets": train_step.TARGETS, "batch_size": rows, "max_length": tokens, **settings}
    return Recipe.of(model=str(file), data="-", out="-", **fields)


def estimated(number: int) -> dict[str, Any]:
    from lora.train.estimate import estimate

    with tempfile.TemporaryDirectory() as folder:
        found = estimate(recipe_of(number, Path(folder)), device="cuda")
    shape, rows, tokens, settings = CASES[number]
    words = json.dumps({key: value for key, value in settings.items() if key != "targets"})
    return {
        "case": number, "shape": shape, "rows": rows, "tokens": tokens, "settings": words,
        "estimate_gib": round(found.peak / 2**30, 3), "moment": found.moment,
    }  # fmt: skip


def measured(number: int) -> float:
    """GiB at the peak of a step, as torch counts them."""
    import contextlib

    import torch
    from on_gpu import training_step

    import lora

    shape, rows, tokens, _ = CASES[number]
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(number, Path(folder))
    if recipe.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    kind = "bf16" if recipe.quantize == "none" else recipe.quantize
    model = train_step.base_model(8) if shape == "8 layers" else quantized.base_model(shape, kind)
    lora.inject(model, config=recipe.adapter())
    lora.prepare(model, checkpointing="offload" if recipe.offload else recipe.gradient_checkpointing)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = quantized.optimizer_of(trained, ["8bit"] if recipe.optimizer == "adamw_8bit" else [])
    ids = torch.randint(3, 90, (rows, tokens), device="cuda")
    step = training_step(model, optimizer, ids, contextlib.nullcontext())
    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    return float(torch.cuda.max_memory_allocated() / 2**30)


def shown(row: dict[str, Any]) -> str:
    said = f"{row['shape']:9} {row['rows']:2} x {row['tokens']:4}  {row['settings']:100}  {row['estimate_gib']:7.2f}"
    return said + (f"  {row['peak_gib']:7.2f}  {row['ratio']:.3f}" if "ratio" in row else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=int, help="one configuration by its number, in this process")
    parser.add_argument("--csv")
    parser.add_argument("--estimates", action="store_true", help="estimates alone")
    a = parser.parse_args()
    quiet_peers("")
    if a.estimates:
        for number in range(len(CASES)):
            print(shown(estimated(number)), flush=True)
    elif a.one is not None:
        row = estimated(a.one)
        peak = measured(a.one)
        print_result({**row, "peak_gib": round(peak, 3), "ratio": round(row["estimate_gib"] / peak, 4)})
    else:
        in_processes(sys.argv[0], [["--one", str(n)] for n in range(len(CASES))], shown, a.csv, seconds=150)


if __name__ == "__main__":
    main()
