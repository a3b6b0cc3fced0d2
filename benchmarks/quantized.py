"""One training step over a quantized base on one GPU, ours beside the frozen floor and the peers, with memory by part.

    PYTHONPATH=src python benchmarks/quantized.py --csv out.csv             # all cases, one process each
    PYTHONPATH=src python benchmarks/quantized.py --csv out.csv --case 7b   # one group of cases
    PYTHONPATH=src python benchmarks/quantized.py --one "7b lora nf4 offload" --profile

7b: Llama-2-7B's shape, 4 x 2048 tokens, r=16 on all linears, checkpointing. 512: the same model, 1 x 512, r=8 on q and
v. 70b: Llama-3.1-70B's shape, 1 x 2048. Weights are random and quantized for real, layer by layer on the GPU. Liger's
kernels run in ours and in the frozen floor. Nothing is timed before the gate: y, dx, dA and dB of a quantized linear
within twice the error of dequantize-then-torch in bf16 against float64, and two backward runs equal to the bit.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import in_processes, print_result, quiet_peers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {  # rows, tokens, r, targets
    "7b": (4, 2048, 16, TARGETS),
    "512": (1, 512, 8, ["q_proj", "v_proj"]),
    "70b": (1, 2048, 16, TARGETS),
}
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
SHAPES["512"] = SHAPES["7b"]
VARIANTS = [  # case, who, base, and words: offload, 8bit (AdamW), graph, r64
    "7b frozen bf16",
    "7b lora bf16",
    "7b lora nf4 offload",
    "7b lora int8 offload",
    "512 lora nf4 graph",
    "512 lora nf4 graph 8bit",
    "70b lora nf4 offload",
    "70b lora nf4 offload 8bit r64",
    "7b peft bf16",
    "7b peft nf4",
    "7b unsloth nf4",
    "512 unsloth nf4",
    "7b peft int8",
    "7b lora nf4",
    "7b lora int8",
    "512 lora nf4",
    "512 peft nf4",
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="one variant, in this process")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--only", help="variants with this in their name")
    parser.add_argument("--csv")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--save", choices=CASES, help="write the model that a peer loads from a folder")
    a = parser.parse_args()
    if a.profile and a.one is None:
        parser.error("--profile needs --one")
    return a


def quantized_linear(old: Any, kind: str) -> Any:
    """A linear of random weights on the GPU in the place of one on the meta device."""
    import bitsandbytes as bnb
    import torch
    from torch import nn

    out_features, in_features = old.weight.shape
    weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16).mul_(0.02)
    with torch.device("meta"):
        if kind == "nf4":
            new = bnb.nn.Linear4bit(in_features, out_features, bias=False, compute_dtype=torch.bfloat16)
        elif kind == "int8":
            new = bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False, threshold=6.0)
        else:
            new = nn.Linear(in_features, out_features, bias=False)
    if kind == "nf4":
        state = {"quant_type": "nf4", "compress_statistics": True, "requires_grad": False}
        new.weight = bnb.nn.Params4bit(weight, module=new, **state).to("cuda")
    elif kind == "int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        new.weight = bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
    else:
        new.weight = nn.Parameter(weight, requires_grad=False)
    return new


def base_model(case: str, kind: str) -> Any:
    """A Llama of random weights, made on the GPU module by module, so that the dense model is never there."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    torch.manual_seed(0)
    config = LlamaConfig(
        max_position_embeddings=8192, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        **SHAPES[case],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, quantized_linear(module, kind))
        elif module._parameters:
            module.to_empty(device="cuda", recurse=False)
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    with torch.device("cuda"):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.config.use_cache = False
    return model.requires_grad_(False)


def built(words: list[str]) -> tuple[Any, Any, int]:
    """(model, context for the forward pass, bytes of the base)"""
    import contextlib

    import torch

    case, who, kind, *options = words
    _, tokens, r, targets = CASES[case]
    r = 64 if "r64" in options else r
    bf16 = torch.autocast("cuda", torch.bfloat16)
    if who == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(folder_of(case)), max_seq_length=tokens, dtype=torch.bfloat16, load_in_4bit=True
        )
        size = torch.cuda.memory_allocated()
        model = FastLanguageModel.get_peft_model(
            model, r=r, target_modules=targets, lora_alpha=2 * r, lora_dropout=0.0, bias="none",
            use_gradient_checkpointing="unsloth",
        )  # fmt: skip
        return model, bf16, size
    if who in ("frozen", "lora"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = base_model(case, kind)
    size = torch.cuda.memory_allocated()
    kwargs = {"use_reentrant": False}
    if who == "frozen":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
        return model, contextlib.nullcontext(), size
    if who == "lora":
        import lora

        gate(kind)
        lora.inject(model, r=r, targets=targets)
        lora.prepare(model, checkpointing="offload" if "offload" in options else True)
        print(lora.summary(model), file=sys.stderr)
        if "graph" in options:
            graph_layers(model, torch.randint(3, 90, CASES[case][:2], device="cuda"))
        return model, contextlib.nullcontext(), size
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if kind == "bf16":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
    else:
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config), bf16, size


def folder_of(case: str) -> Path:
    return Path(tempfile.gettempdir()) / f"llama_nf4_{SHAPES[case]['num_hidden_layers']}"


def save(case: str) -> None:
    """A folder with the NF4 model and a tokenizer. In a process without the peer, which patches what makes a model."""
    import torch
    from on_gpu import save_tokenizer
    from transformers import BitsAndBytesConfig

    model = base_model(case, "nf4")
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model.save_pretrained(folder_of(case))
    save_tokenizer(folder_of(case))


def gate(kind: str) -> None:
    """Errors of a quantized linear and of dequantize-then-torch in bf16 against float64, on fresh random data."""
    import torch
    from torch import nn

    import lora

    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))
    with torch.device("meta"):
        empty = nn.Linear(4096, 11008, bias=False)
    net = nn.Sequential(quantized_linear(empty, kind))
    lora.inject(net, r=16, targets=["0"])
    term = net[0].lora["default"]
    nn.init.normal_(term.B, std=0.01)
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_()  # rows of the timed 7b cases
    dy = torch.randn(8192, 11008, device="cuda", dtype=torch.bfloat16)
    weight = net[0].lora.frozen.dense(torch.bfloat16)

    def ours() -> list[Any]:
        y = net(x)
        return [y, *torch.autograd.grad(y, [x, term.A, term.B], dy)]

    def plain(dtype: Any) -> list[Any]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, term.A, term.B)]
        y = inputs[0] @ weight.to(dtype).t() + 2 * (inputs[0] @ inputs[1].t()) @ inputs[2].t()
        return [y, *torch.autograd.grad(y, inputs, dy.to(dtype))]

    mine, again, torchs, exact = ours(), ours(), plain(torch.bfloat16), plain(torch.float64)
    for name, a, b, c, d in zip(("y", "dx", "dA", "dB"), mine, again, torchs, exact, strict=True):
        errors = [((t.double() - d).norm() / d.norm()).item() for t in (a, c)]
        print(f"gate: {kind} {name} error {errors[0]:.2e}, dequantize-then-torch {errors[1]:.2e}", file=sys.stderr)
        if not errors[0] <= 2 * errors[1]:
            raise SystemExit(f"gate: {kind} {name} is too far from float64")
        if not torch.equal(a, b):
            raise SystemExit(f"gate: {kind} {name} differs in two runs")


def optimizer_of(parameters: list[Any], options: list[str]) -> Any:
    import torch

    if "8bit" in options:
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(parameters, lr=1e-4)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def measure(a: argparse.Namespace) -> dict[str, Any]:
    import torch
    from on_gpu import print_kernels, time_of_steps, training_step

    words = a.one.split()
    model, context, base_bytes = built(words)
    model.train()
    torch.cuda.empty_cache()
    rows, tokens, _, _ = CASES[words[0]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(trainable, words) if trainable else None
    ids = torch.randint(3, 90, (rows, tokens), device="cuda")
    step = training_step(model, optimizer, ids, context)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    state = torch.cuda.memory_allocated() - before if optimizer is not None else 0
    for _ in range(2):
        step()
    times = time_of_steps(step, a.steps)
    peak = torch.cuda.max_memory_allocated()
    if a.profile:
        print_kernels(step)
    adapters = sum(p.nbytes for p in trainable)
    parts = {"weights": base_bytes, "adapters": adapters, "gradients": adapters, "optimizer": state}
    parts["activations"] = peak - sum(parts.values())
    shape = SHAPES[words[0]]
    parts["workspace_in_them"] = 2 * shape["hidden_size"] * shape["intermediate_size"]
    return {
        "variant": a.one, "rows": rows, "tokens": tokens, "trainable": sum(p.numel() for p in trainable),
        **times, "peak_gib": round(peak / 2**30, 2),
        **{f"{name}_gib": round(size / 2**30, 3) for name, size in parts.items()},
    }  # fmt: skip


def graph_layers(model: Any, ids: Any) -> None:
    """Run everything up to the head as two CUDA graphs, one forward and one backward: a small batch is launch-bound.

    The loss stays outside: Liger's counts the trained tokens on the host.
    """
    import torch
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Hidden(nn.Module):
        def __init__(self, body: Any) -> None:
            super().__init__()
            self.body = body

        def forward(self, ids: Any) -> Any:
            return self.body(input_ids=ids, use_cache=False).last_hidden_state

    class Graphed(nn.Module):
        def __init__(self, run: Any) -> None:
            super().__init__()
            self.run = run

        def forward(self, input_ids: Any, **_: Any) -> Any:
            return BaseModelOutputWithPast(last_hidden_state=self.run(input_ids))

    # There is no dropout here, so no random state to keep, which a graph could not.
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.train()
    model.model = Graphed(torch.cuda.make_graphed_callables(Hidden(model.model), (ids,)))


def shown(r: dict[str, Any]) -> str:
    return (
        f"{r['variant']:30} {r['ms']:8.1f} ms ({r['ms_p20']} to {r['ms_p80']})  {r['peak_gib']:6.2f} GiB  "
        f"weights {r['weights_gib']}, A and B {r['adapters_gib']}, optimizer {r['optimizer_gib']}"
    )


def main() -> None:
    a = arguments()
    quiet_peers(a.one or "")
    if a.save:
        save(a.save)
        return
    if a.one:
        print_result(measure(a))
        return
    chosen: list[list[str]] = []
    for variant in VARIANTS:
        case = variant.split()[0]
        if (a.case and case != a.case) or (a.only and a.only not in variant):
            continue
        if "unsloth" in variant and ["--save", "7b"] not in chosen:  # its folder serves 512 as well
            chosen.append(["--save", "7b"])
        slow = ("int8" in variant and "peft" in variant) or "70b" in variant
        chosen.append(["--one", variant, "--steps", "4" if slow else str(a.steps)])
    in_processes(__file__, chosen, shown, a.csv, seconds=150)


if __name__ == "__main__":
    main()
