"""What each product of a forward and a backward pass runs on, and why: all the rules, from plain numbers.

`launch.py` executes the plan and chooses nothing itself; the summary prints it. x A^T, dy B, dA and dB are bound by the
reading of their tall operand, dX and the forward product by their arithmetic. The forward product stays in cuBLAS
everywhere, so it has no step here.
"""

import functools
from typing import NamedTuple

from ..errors import listed
from ..kernels.tuning import GRADIENTS

TRITON, CUBLAS = "triton", "cublas"
COPY = "masked copy"  # of x, made first and read by cuBLAS
ONCE = "one read"  # of dy, by the kernel that has dy B and dB of it

SMALL = 2048
"""Rows under which a call is taken to be bound by its launches, of which cuBLAS on one stream has the fewest. As CUDA
graphs, r = 16, our kernels on two streams are 2 to 7 % ahead at 2048 rows, 8 % ahead to even at 1024 and 8 % ahead to
6 % behind at 512; without a graph Python takes longer than any of them."""

SHRINK_RANKS, OUTER_RANKS = 64, 32
"""Ranks up to which our shrink (x A^T, dy B), and our outer for dA, beat cuBLAS (measured at 16, 64 and 128)."""

MASKED_RANKS = 64
"""Ranks up to which, under dropout, these two draw the mask themselves; for more they would draw it once for each block
of ranks, and read a masked copy instead (measured at 64 and 96)."""

ONCE_ELEMENTS = 2**27
"""Of dy: the partial sums of the kernel that reads it once grow with it and would leave L2."""


class Shape(NamedTuple):
    """What the plan depends on."""

    rows: int
    width: int  # in
    targets: tuple[tuple[int, int], ...]  # (out, ranks of all its adapters) of each linear that shares the input
    dropout: bool
    element_size: int  # bytes
    major: int  # of the card's compute capability
    processors: int  # of the card
    aligned: bool = True  # whether TMA can read what the large product of dx reads
    triton: bool = True  # whether it is installed


class Step(NamedTuple):
    engine: str
    why: str = ""  # it is not our kernel


class Steps(NamedTuple):
    """By product; dyB and dB by target, where ONCE stands for both."""

    hidden: Step  # x A^T
    dyB: tuple[Step, ...]
    dB: tuple[Step, ...]
    dA: Step
    dx: Step  # TRITON: with the low-rank term in the accumulator
    two_streams: bool  # dA and dB beside dx, which leaves a quarter of the card idle with its last wave of tiles


def why_plain(element_size: int, triton: bool, major: int) -> str:
    """Why none of the kernels runs on a card, in words, or "": then the plain-torch form is as good, on cuBLAS."""
    return _first({
        "triton is not installed": not triton, "GPU older than Ampere": major < 8,
        "no 16-bit compute": element_size != 2,
    })  # fmt: skip


def _first(reasons: dict[str, bool]) -> str:
    return next((reason for reason, holds in reasons.items() if holds), "")


@functools.lru_cache(maxsize=4096)
def plan(shape: Shape) -> Steps:
    """The steps of one call; asked in each forward and each backward pass, so kept by shape."""
    plain = why_plain(shape.element_size, shape.triton, shape.major)
    if plain:
        step, each = Step(CUBLAS, plain), (Step(CUBLAS, plain),) * len(shape.targets)
        return Steps(step, each, each, step, step, two_streams=False)
    ranks = sum(rank for _, rank in shape.targets)
    pairs = [_of_dy(shape.rows, out, rank, shape.major) for out, rank in shape.targets]
    return Steps(
        hidden=_shrink(shape.rows, ranks, shape.dropout), dyB=tuple(dyB for dyB, _ in pairs),
        dB=tuple(dB for _, dB in pairs), dA=_outer(shape.rows, ranks, shape.dropout), dx=_dx(shape),
        two_streams=shape.rows >= SMALL,
    )  # fmt: skip


def _shrink(rows: int, ranks: int, dropout: bool, most: int = SHRINK_RANKS) -> Step:
    """A tall operand times a thin one: x A^T, dy B. The mask is drawn in the kernel, so few rows stay there with it."""
    if dropout:
        return Step(COPY, f"over {MASKED_RANKS} ranks") if ranks > MASKED_RANKS else Step(TRITON)
    if rows < SMALL:
        return Step(CUBLAS, "few rows")
    return Step(CUBLAS, f"over {most} ranks") if ranks > most else Step(TRITON)


def _outer(rows: int, ranks: int, dropout: bool) -> Step:
    """A thin transposed operand times a tall one: dA, and dB where it is apart. Of no rows our kernel writes zeros."""
    return _shrink(rows, ranks, dropout, OUTER_RANKS) if rows else Step(TRITON)


def _of_dy(rows: int, out: int, rank: int, major: int) -> tuple[Step, Step]:
    """dy B and dB of one target.

    One read of dy, measured on one H200 (8192 rows, 1024 to 14336 columns): at r = 16 and 32 it takes 65 to 82 % of the
    time of two passes, at 64 98 to 115 %. On other cards the compiler keeps no load of it in flight, so there the two
    passes stay, with cuBLAS for dB, which is no thin product of dy.
    """
    apart = _first({
        "few rows": rows < SMALL, "no Hopper GPU": major != 9, f"over {max(GRADIENTS)} ranks": rank > max(GRADIENTS),
        f"dY over {ONCE_ELEMENTS:,} elements": rows * out > ONCE_ELEMENTS,
    })  # fmt: skip
    if not apart:
        return Step(ONCE), Step(ONCE)
    dB = _outer(rows, out, False)  # dy is the transposed operand here, thin where there are few outputs
    return _shrink(rows, rank, False), dB if dB.engine == TRITON else Step(CUBLAS, apart)


def _dx(shape: Shape) -> Step:
    """The large product of the backward pass with the low-rank term.

    Measured on one H200 (8192 rows, bf16, r = 16): the Triton GEMM with the term in its accumulator is 2 to 3 % over
    cuBLAS's bare product at 4096 -> 4096, 14336 and 14336 -> 4096, where cuBLAS with the term added first (beta = 1) is
    3 to 8 % over. It needs Hopper, strides that TMA can read, and tiles for at least half the card. Under dropout the
    masked term is written first and cuBLAS adds to it: as fast as a mask inside the GEMM at 4096 x 4096, and 4 % faster
    at 14336 x 4096.
    """
    side = min(shape.width, max(out for out, _ in shape.targets))
    why = _first({
        "no Hopper GPU": shape.major != 9, "dropout": shape.dropout, "strides that TMA cannot read": not shape.aligned,
        "too narrow": side < 256, "few rows": (shape.rows // 128) * (side // 256) * 2 < shape.processors,
    })  # fmt: skip
    return Step(CUBLAS, why) if why else Step(TRITON)


def describe(steps: Steps) -> str:
    """The plan in short words, for a table: "fused", and what of it is not in our kernels."""
    products = [("xA", steps.hidden), *[("dyB", s) for s in steps.dyB], ("dX", steps.dx), ("dA", steps.dA)]
    products += [("dB", s) for s in steps.dB]
    names: dict[str, list[str]] = {}  # of the products that cuBLAS has, by the reason
    for name, step in products:
        if step.engine in (CUBLAS, COPY) and name not in names.setdefault(step.why, []):
            names[step.why].append(name)
    every = len({name for name, _ in products})
    parts = [f"{'all' if len(n) == every else listed(n)} by cuBLAS ({why})" for why, n in names.items()]
    return ", ".join(["fused", *parts])
