"""How A and B start."""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def init_(A: Tensor, B: Tensor, method: str) -> None:
    """Fill A (r, in) and B (out, r). B is zero, so that a fresh adapter changes nothing.

    "gaussian": A ~ N(0, 1/r) by standard deviation. "kaiming": A as nn.Linear starts its weight.
    """
    nn.init.zeros_(B)
    if method == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
