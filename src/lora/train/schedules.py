"""The learning rate of each step, as a share of the recipe's."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def scheduler(optimizer: Optimizer, name: str, warmup: int, steps: int) -> LambdaLR:
    """transformers' schedules, but for the warm-up, whose first step is none at rate 0: that would move nothing."""
    return LambdaLR(optimizer, partial(share, name=name, warmup=warmup, steps=steps))


def share(step: int, name: str, warmup: int, steps: int) -> float:
    """What step number `step` (from 0) takes of the rate."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if name == "linear":
        return max(0.0, 1.0 - done)
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    return 1.0
