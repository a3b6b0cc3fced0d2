"""One training step (AdamW included) of a Llama-shaped model on one GPU: ours, the frozen floor, and the peers.

    PYTHONPATH=src python benchmarks/train_step.py --csv out.csv            # all variants, one process each
    PYTHONPATH=src python benchmarks/train_step.py --one lora+liger         # one, here
    PYTHONPATH=src python benchmarks/train_step.py --one lora --profile     # and its time by kernel

frozen: forward and dX only. +liger: Liger's RMSNorm, RoPE, SwiGLU and fused cross-entropy, by its own function. The
tax is (step - frozen step) / frozen step between the variants with the same surroundings. The frozen floor runs first
and last, to show the card's drift. Before any of them a process of its own passes the gate, or nothing is timed:
logits, dx, dA and dB (and dmagnitude) of LoRA and DoRA without Liger at 2048 rows within twice plain torch's own error
of float64, and two backward runs equal to the bit.
"""

import argparse
import copy
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import in_processes, print_result, quiet_peers

VARIANTS = [
    ["frozen+liger"],
    ["lora+liger"],
    ["lora+liger", "--dropout", "0.05"],
    ["peft+liger"],
    ["dora+liger"],
    ["peft_dora+liger"],
    ["unsloth"],
    ["unsloth", "--dropout", "0.05"],
    ["frozen"],
    ["lora"],
    ["peft"],
    ["frozen+liger", "--checkpointing"],
    ["lora+liger", "--checkpointing"],
    ["peft+liger", "--checkpointing"],
    ["unsloth", "--checkpointing"],
    ["frozen", "--checkpointing"],
    ["lora", "--checkpointing"],
    ["peft", "--checkpointing"],
    ["frozen+liger"],
]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="frozen, lora, dora, peft, peft_dora, each also with +liger, or unsloth")
    parser.add_argument("--csv")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only", help="variants with this in their name and options")
    parser.add_argument("--gate", action="store_true", help="the gate alone, in this process")
    a = parser.parse_args()
    if a.one is None and (a.dropout or a.checkpointing or a.profile):
        parser.error("--dropout, --checkpointing and --profile need --one; a whole run has its own, see VARIANTS")
    return a


def of_every_process(a: argparse.Namespace) -> list[str]:
    return [word for name in ("layers", "batch", "tokens", "r", "steps") for word in (f"--{name}", str(vars(a)[name]))]


def base_model(layers: int) -> Any:
    """Random weights, made on the GPU in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, **SHAPE)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config.use_cache = False
    return model


def built(a: argparse.Namespace) -> tuple[Any, Any]:
    """(model, context for the forward pass)"""
    import contextlib

    import torch

    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if a.one == "unsloth":
        return unsloth_model(a), torch.autocast("cuda", torch.bfloat16)
    if a.one.endswith("+liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = base_model(a.layers)
    if a.checkpointing:
        model.gradient_checkpointing_enable(**checkpointing)
    if a.one.startswith("frozen"):
        model.requires_grad_(False)
        model.enable_input_require_grads()
        return model, contextlib.nullcontext()
    if a.one.startswith(("lora", "dora")):
        import lora

        lora.inject(model, r=a.r, targets=TARGETS, dropout=a.dropout, dora=a.one.startswith("dora"))
        print(lora.summary(model), file=sys.stderr)
        return model, contextlib.nullcontext()
    from peft import LoraConfig, get_peft_model

    if a.checkpointing:
        model.enable_input_require_grads()
    config = LoraConfig(
        r=a.r, lora_alpha=2 * a.r, lora_dropout=a.dropout, target_modules=TARGETS, task_type="CAUSAL_LM",
        use_dora=a.one.startswith("peft_dora"),
    )  # fmt: skip
    return get_peft_model(model, config), torch.autocast("cuda", torch.bfloat16)


def unsloth_model(a: argparse.Namespace) -> Any:
    import torch
    from on_gpu import save_tokenizer
    from unsloth import FastLanguageModel

    path = Path(tempfile.gettempdir()) / f"llama_{a.layers}"
    if not (path / "config.json").exists():
        base_model(a.layers).save_pretrained(path)
        save_tokenizer(path)
        gc.collect()
        torch.cuda.empty_cache()
    model, _ = FastLanguageModel.from_pretrained(
        str(path), max_seq_length=a.tokens, dtype=torch.bfloat16, load_in_4bit=False
    )
    return FastLanguageModel.get_peft_model(
        model, r=a.r, target_modules=TARGETS, lora_alpha=2 * a.r, lora_dropout=a.dropout, bias="none",
        use_gradient_checkpointing="unsloth" if a.checkpointing else False,
    )  # fmt: skip


def gate(model: Any) -> None:
    """Errors of the fused model and of plain torch's against float64, on fresh random data; raises where they fail."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from lora.layers import plan

    def results(m: Any, embedded: Any, ids: Any) -> dict[str, Any]:
        m.zero_grad(set_to_none=True)
        x = embedded.detach().to(m.dtype).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the backward passes of the fused attentions do not repeat to the bit
            out = m(inputs_embeds=x, labels=ids, use_cache=False)
            out.loss.backward()
        found: dict[str, list[Any]] = {"logits": [out.logits.detach()], "dx": [x.grad]}
        for name, parameter in m.named_parameters():
            if parameter.grad is not None:
                found.setdefault("d" + name.rpartition(".")[2], []).append(parameter.grad)
        return {name: torch.cat([t.double().flatten() for t in tensors]) for name, tensors in found.items()}

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.01)
    device = next(model.parameters()).device
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))
    ids = torch.randint(3, 90, (1, 2048), device=device)
    embedded = model.get_input_embeddings()(ids).detach()
    ours, again = results(model, embedded, ids), results(model, embedded, ids)
    devices, plan.DEVICES = plan.DEVICES, ()
    plain = results(model, embedded, ids)
    exact = results(copy.deepcopy(model).double(), embedded, ids)
    plan.DEVICES = devices
    for name, truth in exact.items():
        errors = [((r[name] - truth).norm() / truth.norm()).item() for r in (ours, plain)]
        print(f"gate: {name} error {errors[0]:.2e}, plain torch's {errors[1]:.2e}", flush=True)
        if not errors[0] <= 2 * errors[1]:
            raise SystemExit(f"gate: {name} is too far from float64")
        if not torch.equal(ours[name], again[name]):
            raise SystemExit(f"gate: {name} differs in two runs")


def gated(a: argparse.Namespace) -> None:
    import lora

    for dora in (False, True):
        gate(lora.inject(base_model(a.layers), r=a.r, targets=TARGETS, dora=dora))


def measure(a: argparse.Namespace) -> dict[str, Any]:
    import torch
    from on_gpu import print_kernels, time_of_steps, training_step

    model, context = built(a)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True) if trainable else None
    ids = torch.randint(3, 90, (a.batch, a.tokens), device="cuda")
    step = training_step(model, optimizer, ids, context)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        step()
    times = time_of_steps(step, a.steps)
    peak = torch.cuda.max_memory_allocated() / 2**30
    if a.profile:
        print_kernels(step)
    return {
        "variant": a.one, "dropout": a.dropout, "checkpointing": a.checkpointing, "layers": a.layers, "r": a.r,
        "rows": a.batch, "tokens": a.tokens, "trainable": sum(p.numel() for p in trainable), **times,
        "peak_gib": round(peak, 2),
    }  # fmt: skip


def shown(r: dict[str, Any]) -> str:
    return (
        f"{r['variant']:13} dropout {r['dropout']:<5} checkpointing {r['checkpointing']!s:5} {r['ms']:8.2f} ms "
        f"({r['ms_p20']} to {r['ms_p80']})  {r['peak_gib']:6.2f} GiB"
    )


def main() -> None:
    a = arguments()
    quiet_peers(a.one or "")
    if a.gate:
        gated(a)
    elif a.one:
        print_result(measure(a))
    else:
        if subprocess.run([sys.executable, __file__, "--gate", *of_every_process(a)]).returncode:
            raise SystemExit("nothing was timed")
        variants = [variant for variant in VARIANTS if a.only is None or a.only in " ".join(variant)]
        chosen = [["--one", *variant, *of_every_process(a)] for variant in variants]
        in_processes(__file__, chosen, shown, a.csv, seconds=170)


if __name__ == "__main__":
    main()
