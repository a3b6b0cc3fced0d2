"""One training step (forward, backward, AdamW) of the small example model on CPU: ours beside PEFT's, in turns.

r=8 on all linears, fp32, two threads. Before any time: the losses and the gradients of both must agree.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from common import RESULTS, interleaved, ratio, spread, write_csv
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lora
from lora.layers import hosts

MODEL = Path(__file__).parents[1] / "examples" / "tiny-llama-8m"


def step(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--dropout", type=float, default=0.0)
    settings = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = torch.randint(5, 8000, (settings.batch, settings.tokens))
    ours = lora.inject(copy.deepcopy(base), r=8, alpha=16, targets="all-linear", dropout=settings.dropout)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=settings.dropout)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, _, adapters in hosts(ours):
            layer, part = theirs.base_model.model.get_submodule(name), adapters["default"]
            part.B.normal_(std=0.01)
            layer.lora_A["default"].weight.copy_(part.A)
            layer.lora_B["default"].weight.copy_(part.B)
    for model in (ours, theirs):
        model.eval()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    one, two = (torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (ours, theirs))
    error = ((one.norm() - two.norm()) / two.norm()).abs().item()
    assert one.shape == two.shape, "another number of gradients"
    assert error < 1e-5, error
    for model in (ours, theirs):
        model.train().zero_grad(set_to_none=True)
    frozen = copy.deepcopy(base).requires_grad_(False).train()
    frozen.enable_input_require_grads()

    def floor() -> None:
        frozen(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    seconds = interleaved({"frozen": floor, "lora": step(ours, ids), "peft": step(theirs, ids)}, settings.rounds, 1)
    rows: list[dict[str, object]] = []
    for name, values in seconds.items():
        low, median, high = (1e3 * v for v in spread(values))
        rows.append({
            "variant": name, "batch": settings.batch, "tokens": settings.tokens, "dropout": settings.dropout,
            "ms_p20": round(low, 1), "ms_median": round(median, 1), "ms_p80": round(high, 1),
            "ratio_to_peft": round(ratio(values, seconds["peft"]), 3),
            "ratio_to_frozen": round(ratio(values, seconds["frozen"]), 3),
        })  # fmt: skip
        print(f"{name:7} {median:8.1f} ms  {rows[-1]['ratio_to_peft']} x PEFT  {rows[-1]['ratio_to_frozen']} x frozen")
    write_csv(RESULTS / f"train_step_cpu{'_dropout' if settings.dropout else ''}.csv", rows)


if __name__ == "__main__":
    main()
