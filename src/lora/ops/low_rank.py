"""The update as a matrix, for merging."""

from collections.abc import Iterable

import torch
from torch import Tensor


def low_rank_product(updates: Iterable[tuple[Tensor, Tensor, float]], rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of D = sum of s B A, (n, in) in `dtype`, from A (r, in), B (out, r) and s.

    Summed in float64 and rounded once, so that merge and unmerge find the same bits again whatever the
    number of threads or the device: the order of summation moves a float64 sum by far less than fp32 shows.
    """
    total: Tensor | None = None
    for A, B, scaling in updates:
        product = (B[rows].double() @ A.double()).mul_(scaling)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total.to(dtype)
