"""A LLaMA-Adapter on Llama-2-7B's shape, bf16 and NF4: over the frozen step, beside PEFT's adaption prompt, and the
time that 52,002 rows x 5 passes would take.

    PYTHONPATH=src python benchmarks/llama_adapter.py --csv out.csv --lengths lengths.json
    PYTHONPATH=src python benchmarks/llama_adapter.py --one none --shape tiny --steps 3    # here, without a card

One process a base; within it the same model takes turns: frozen (forward, and backward to the embeddings), ours, frozen
again, PEFT. 4 x 2048 tokens, 30 of 32 layers, 10 prompts, checkpointing and Liger's kernels on all sides, AdamW.
`--lengths` is a JSON list of row lengths in tokens: 200 steps of 32 such rows are measured (padded, shuffled), and from
their rows a second follows what 52,002 x 5 would take. Nothing is timed before the gate: the fresh model's logits
are the base's to the bit, and with open gates the prompts' gradients are within twice a bf16 reference's own error of
float64.
"""

import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import quantized
from common import in_processes, print_result, quiet_peers

LAYERS, PROMPTS, ROWS, PASSES = 30, 10, 52_002, 5
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=["none", "bf16", "nf4"], help="one base, in this process")
    parser.add_argument("--shape", default="7b", choices=["7b", "tiny"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lengths")
    parser.add_argument("--csv")
    return parser.parse_args()


def base_of(a: argparse.Namespace) -> Any:
    if a.shape == "7b":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
        return quantized.base_model("7b", a.one)
    from transformers import AutoModelForCausalLM, LlamaConfig

    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    model.config.use_cache = False
    return model.requires_grad_(False)


def gate(model: Any, layers: int) -> None:
    """A fresh adapter changes no bit; the gradients of one with open gates, by the model and by plain torch."""
    import torch

    import lora
    from lora.ops.prompt_attention import add_prompt_attention

    device = next(model.parameters()).device
    ids = torch.randint(3, 90, (2, 64), device=device)
    with torch.no_grad():
        model.eval()
        before = model(input_ids=ids).logits
        lora.llama_adapter.inject(model, layers=layers, prompt_length=PROMPTS)
        model.eval()
        if not torch.equal(before, model(input_ids=ids).logits):
            raise SystemExit("gate: a fresh adapter changes the logits")
    lora.remove(model)

    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, keys, dim, length = 32, 8, 128, 512
    shapes = {"output": (2, length, heads, dim), "query": (2, heads, length, dim), "keys": (1, keys, PROMPTS, dim),
              "values": (1, keys, PROMPTS, dim), "factors": (1, heads)}  # fmt: skip
    made = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    dy = torch.randn(shapes["output"], device=device)

    def run(dtype: Any, reference: bool) -> list[Any]:
        t = {k: v.to(dtype if k != "factors" or dtype == torch.float64 else torch.float32).requires_grad_()
             for k, v in ((k, v.to(low)) for k, v in made.items())}  # fmt: skip
        if reference:
            k, v = (t[name].repeat_interleave(heads // keys, 1) for name in ("keys", "values"))
            weights = (t["query"] @ k.transpose(2, 3) * dim**-0.5).softmax(-1)
            y = t["output"] + (t["factors"].to(dtype)[:, :, None, None] * (weights @ v)).transpose(1, 2)
        else:
            y = add_prompt_attention(t["output"], t["query"], t["keys"], t["values"], t["factors"])
        return [y, *torch.autograd.grad(y, list(t.values()), dy.to(dtype))]

    ours, plain, exact = run(low, False), run(low, True), run(torch.float64, True)
    for name, mine, theirs, truth in zip(("y", *made), ours, plain, exact, strict=True):
        errors = [((each.double() - truth).norm() / truth.norm()).item() for each in (mine, theirs)]
        print(f"gate: d {name} error {errors[0]:.2e}, plain torch {errors[1]:.2e}", file=sys.stderr)
        if not errors[0] <= 2 * errors[1] + 1e-7:
            raise SystemExit(f"gate: {name} is too far from float64")


def timed(a: argparse.Namespace, model: Any, ids: Any, trained: list[Any], context: Any) -> dict[str, float]:
    """ms of a step, and GiB at its peak."""
    import torch
    from on_gpu import time_of_steps, training_step

    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True) if trained else None
    step = training_step(model, optimizer, ids, context)
    if ids.device.type == "cpu":
        step()
        start = time.perf_counter()
        for _ in range(a.steps):
            step()
        return {"ms": round((time.perf_counter() - start) / a.steps * 1e3, 2)}
    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    found = time_of_steps(step, a.steps)
    return {**found, "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def rows_a_second(model: Any, trained: list[Any], lengths: list[int], device: Any) -> tuple[float, float]:
    """(rows, tokens without padding) a second over 200 steps of 32 rows, padded to the longest of each step."""
    import torch

    from lora.data.order import batches

    order = batches(lengths, 32, 0, 0, True)[: 200 if device.type == "cuda" else 3]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    random.seed(0)
    start = 0.0
    for number, batch in enumerate(order):
        if number == min(5, len(order) - 1):
            torch.cuda.synchronize() if device.type == "cuda" else None
            start, counted = time.perf_counter(), order[number:]
        own = [lengths[i] for i in batch]
        ids = torch.randint(3, 90, (len(own), max(own)), device=device)
        mask = torch.arange(max(own))[None, :] < torch.tensor(own)[:, None]
        mask = mask.to(device)
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize() if device.type == "cuda" else None
    seconds = time.perf_counter() - start
    rows = sum(len(batch) for batch in counted)
    return rows / seconds, sum(lengths[i] for batch in counted for i in batch) / seconds


def frozen(model: Any) -> Callable[[], None]:
    """Ready for the frozen step; what it gives takes the hook away again."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    hook = model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
    return hook.remove


def measure(a: argparse.Namespace) -> dict[str, Any]:
    import torch

    import lora

    model = base_of(a)
    device = next(model.parameters()).device
    layers = LAYERS if a.shape == "7b" else 3
    rows, tokens = (4, 2048) if a.shape == "7b" else (2, 64)
    gate(model, layers)
    ids = torch.randint(3, 90, (rows, tokens), device=device)
    nothing = contextlib.nullcontext()
    found: dict[str, Any] = {"base": a.one, "card": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}

    def floor(name: str) -> None:
        done = frozen(model)
        found.update({f"{name}_{key}": value for key, value in timed(a, model, ids, [], nothing).items()})
        done()

    floor("frozen")
    lora.llama_adapter.inject(model, layers=layers, prompt_length=PROMPTS)
    lora.prepare(model, checkpointing=True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    found["trained"] = sum(p.numel() for p in trained)
    found.update({f"ours_{key}": value for key, value in timed(a, model, ids, trained, nothing).items()})
    if a.lengths:
        with open(a.lengths) as file:
            lengths = json.load(file)
        model.gradient_checkpointing_disable()
        per_second, real = rows_a_second(model, trained, lengths, device)
        found.update(rows_per_second=round(per_second, 2), row_tokens_per_second=round(real, 1),
                     hours_52k_x_5=round(ROWS * PASSES / per_second / 3600, 3))  # fmt: skip
    lora.remove(model)
    floor("frozen_again")
    found["ours_over_frozen"] = round(found["ours_ms"] * 2 / (found["frozen_ms"] + found["frozen_again_ms"]), 4)
    try:
        found.update(by_peft(a, model, ids, layers))
    except Exception as error:  # a peer that does not run here is a result as well
        found["peft_failed"] = f"{type(error).__name__}: {error}"[:200]
    return found


def by_peft(a: argparse.Namespace, model: Any, ids: Any, layers: int) -> dict[str, Any]:
    import torch
    from peft import AdaptionPromptConfig, get_peft_model

    config = AdaptionPromptConfig(adapter_len=PROMPTS, adapter_layers=layers, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    context = torch.autocast("cuda", torch.bfloat16) if ids.device.type == "cuda" else contextlib.nullcontext()
    return {f"peft_{key}": value for key, value in timed(a, model, ids, trained, context).items()}


def shown(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items())


def main() -> None:
    a = arguments()
    quiet_peers("")
    if a.one:
        print_result(measure(a))
        return
    lengths = ["--lengths", a.lengths] if a.lengths else []
    in_processes(sys.argv[0], [["--one", kind, *lengths] for kind in ("nf4", "bf16")], shown, a.csv, seconds=200)


if __name__ == "__main__":
    main()
