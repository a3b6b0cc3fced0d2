"""What one wrapped linear costs in Python: CPU, a batch of one token, small enough that the arithmetic is nothing.

raw: the operations themselves on plain tensors; ours, PEFT: the wrapped module's call. Target: ours <= 1.5 x raw.
"""

import argparse

import peft
import torch
import torch.nn.functional as F
from common import RESULTS, interleaved, ratio, spread, write_csv
from torch import nn

import lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--size", type=int, default=64)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n = settings.size
    x = torch.randn(1, n)
    rows: list[dict[str, object]] = []
    for mode in ("inference", "training"):
        base, r, s = nn.Linear(n, n, bias=False), 8, 2.0
        ours = lora.inject(nn.Sequential(nn.Linear(n, n, bias=False)), r=r, targets=["0"])[0]
        wrapped = peft.get_peft_model(
            nn.Sequential(nn.Linear(n, n, bias=False)), peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"])
        )
        theirs = wrapped.base_model.model[0]
        merged = lora.inject(nn.Sequential(nn.Linear(n, n, bias=False)), r=r, targets=["0"])
        lora.merge(merged)
        W = base.weight.detach()
        A, B = (nn.Parameter(t) for t in (torch.randn(r, n), torch.randn(n, r)))
        variants = {
            "raw": lambda W=W, A=A, B=B, s=s: F.linear(x, W) + F.linear(F.linear(x, A), B) * s,
            "lora": lambda layer=ours: layer(x),
            "peft": lambda layer=theirs: layer(x),
            "bare linear": lambda layer=base: layer(x),
            "lora merged": lambda layer=merged[0]: layer(x),
        }
        with torch.set_grad_enabled(mode == "training"):
            seconds = interleaved(variants, settings.rounds, 200)
        for name, values in seconds.items():
            low, median, high = (1e6 * v for v in spread(values))
            against = "bare linear" if name in ("lora merged", "bare linear") else "raw"
            rows.append({
                "mode": mode, "variant": name, "us_p20": round(low, 2), "us_median": round(median, 2),
                "us_p80": round(high, 2), "against": against, "ratio": round(ratio(values, seconds[against]), 3),
            })  # fmt: skip
    for row in rows:
        print(
            f"{row['mode']:10} {row['variant']:12} {row['us_median']:8.2f} us  {row['ratio']:6.3f} x {row['against']}"
        )
    write_csv(RESULTS / "python_cost.csv", rows)


if __name__ == "__main__":
    main()
