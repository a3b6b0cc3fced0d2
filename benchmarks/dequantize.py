"""Dequantizing a frozen weight on one GPU: our kernels beside bitsandbytes and the floor.

    PYTHONPATH=src python benchmarks/dequantize.py [--csv out.csv] [--sweep]

A case is timed only after its gate: our result, written over NaN, equals bitsandbytes' in bf16 and fp16. Then each is a
captured CUDA graph over as many copies of the weight and of the result as the L2 cache cannot hold, their replays
alternate, and the median counts. The floor is the bytes at 4.25 TB/s, a card's copy rate.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import write_csv
from on_gpu import race
from torch import Tensor

from lora.bases.eight_bit import EightBitLayout
from lora.bases.four_bit import FourBitLayout

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336)]
KINDS = {"nf4 nested": ("nf4", True), "nf4": ("nf4", False), "fp4": ("fp4", False), "int8": ("int8", False)}
RATE = 4.25e12
BEYOND_L2 = 200e6  # bytes of weights and results in turn; an H200 caches 50 MB
Runs = dict[str, Callable[[int], object]]
Configs = dict[str, dict[str, Any] | None]  # None: the sizes that are set in the kernels' module


class Case:
    """A weight that bitsandbytes quantized, copies of its parts and a result for each."""

    def __init__(self, kind: str, shape: tuple[int, int]) -> None:
        import bitsandbytes.functional as bnb

        self.bnb = bnb
        name, nested = KINDS[kind]
        w = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        if name == "int8":
            self.format: Any = EightBitLayout(name, shape)
            codes, scales, _ = bnb.int8_vectorwise_quant(w.half())
            parts = [codes, scales]
        else:
            self.format = FourBitLayout(name, shape, 64, 256 if nested else 0)
            packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=name, compress_statistics=nested)
            parts = [packed.view(-1), state.absmax, state.code]
            if nested:
                parts += [state.state2.absmax, state.state2.code, state.offset]
            self.state = state
        self.bytes: int = sum(t.nbytes for t in parts) + 2 * w.numel()
        copies = max(2, int(-(-BEYOND_L2 // self.bytes)))
        self.parts = [[t.clone() for t in parts] for _ in range(copies)]
        self.outs = [torch.empty_like(w) for _ in range(copies)]

    @property
    def floor(self) -> float:
        return self.bytes / RATE * 1e6

    def ours(self, i: int, config: dict[str, Any] | None = None, out: Tensor | None = None) -> Tensor:
        from lora.kernels.dequantize import four_bit, int8

        out = self.outs[i] if out is None else out
        if self.format.kind == "int8":
            codes, scales = self.parts[i]
            return int8(codes, scales, config)(out)
        return four_bit(out.numel(), self.parts[i], self.format.block, self.format.nested, config)(out)

    def theirs(self, i: int, out: Tensor | None = None) -> Tensor:
        out = self.outs[i] if out is None else out
        if self.format.kind == "int8":  # the line of MatMul8bitLt.backward
            codes, scales = self.parts[i]
            return codes.to(out.dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
        packed, self.state.absmax = self.parts[i][:2]
        self.state.dtype = out.dtype
        self.bnb.dequantize_4bit(packed.view(-1, 1), self.state, out=out)
        return out

    @property
    def calls(self) -> int:
        """Calls in one graph: each copy equally often."""
        return len(self.parts) * max(1, 16 // len(self.parts))

    def sizes(self) -> Configs:
        """Block sizes to try: eight weights a thread at a time, once to eight times."""
        found: Configs = {}
        for warps, times in itertools.product((2, 4, 8), (1, 2, 4, 8)):
            groups = warps * 32 * times
            size = {"COLUMNS": groups * 8} if self.format.kind == "int8" else {"WORDS": groups}
            found[f"{size} warps {warps}"] = size | {"warps": warps}
        return found


def gate(case: Case, configs: Configs, dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in dtypes:
        truth = case.theirs(0, torch.empty(case.format.shape, device="cuda", dtype=dtype))
        for name, config in configs.items():
            out = torch.full_like(truth, float("nan"))
            if not torch.equal(case.ours(0, config, out), truth):
                wrong = int((out != truth).sum())
                raise SystemExit(f"gate: {case.format} {name} in {dtype}: {wrong} weights differ from bitsandbytes'")


def timed(case: Case, runs: Runs, rounds: int = 11) -> dict[str, float]:
    return race(runs, case.calls, len(case.parts), rounds, heat=0.1)


def sweep(case: Case) -> None:
    """Print the three fastest sizes."""
    configs = case.sizes()
    gate(case, configs, (torch.bfloat16,))  # each dtype is another kernel to compile
    times = timed(case, {name: functools.partial(case.ours, config=c) for name, c in configs.items()}, rounds=7)
    print(f"sweep of {case.format}, floor {case.floor:.1f} us")
    for name in sorted(times, key=times.__getitem__)[:3]:
        print(f"  {times[name]:6.1f} us  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv")
    parser.add_argument("--sweep", action="store_true", help="other sizes, for two cases")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/dequantize.py needs an NVIDIA GPU")
    torch.manual_seed(0)
    rows = []
    for shape, kind in itertools.product(SHAPES, KINDS):
        case = Case(kind, shape)
        gate(case, {"ours": None}, (torch.bfloat16, torch.float16))
        times = timed(case, {"ours": case.ours, "bitsandbytes": case.theirs})
        row = {"shape": "{}x{}".format(*shape), "kind": kind, "MB": round(case.bytes / 1e6, 1)}
        row |= {"floor_us": round(case.floor, 1)} | {f"{name}_us": round(t, 1) for name, t in times.items()}
        row["ours_over_floor"] = round(times["ours"] / case.floor, 2)
        rows.append(row)
        print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        if arguments.sweep and shape == SHAPES[-1] and kind in ("nf4 nested", "int8"):
            sweep(case)
        del case
        torch.cuda.empty_cache()
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
