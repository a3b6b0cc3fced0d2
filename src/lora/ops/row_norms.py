"""The norm of each row of W0 + s B A, without B A: what DoRA divides by (Liu et al., 2024, arXiv:2402.09353).

With P the stacked A and Q the stacked s B,

    ||W0 + Q P||^2 = ||W0||^2 + ((2 W0 P^T + Q (P P^T)) . Q)        by row, "." a sum of products over the ranks
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import rehearsal

BLOCK = 2**20  # elements of W0 that are in the wide dtype at a time


@torch.no_grad()
def row_norms(
    weight: Tensor, pairs: Sequence[tuple[Tensor, Tensor, float]], dtype: torch.dtype = torch.float32
) -> Tensor:
    """||W0 + sum of s B A|| by row, (out,) in `dtype`; no gradient.

    A GPU reads W0 as it is, with P in its dtype and fp32 sums; elsewhere, and in float64, W0 is widened by blocks of
    rows. The sum cancels where a row of W0 + s B A is a thousandth of W0's and less: there fp32 has few digits left.

    Args:
        weight: W0 (out, in), any float dtype; pairs: A (r, in), B (out, r) and s, none or many; dtype: what is computed
            in, float32 or float64.
    """
    with torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):  # meta has none
        if not pairs:
            bare: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
            return bare
        P = torch.cat([A.to(dtype) for A, _, _ in pairs])  # (R, in)
        Q = torch.cat([B.to(dtype) * s for _, B, s in pairs], 1)  # (out, R)
        on_card = weight.is_cuda or rehearsal.on_card(weight)
        if on_card and dtype == torch.float32 and weight.element_size() <= 4:
            return _norms(weight, P, Q)
        rows = max(1, BLOCK // weight.shape[1])
        blocks = zip(weight.split(rows), Q.split(rows), strict=True)
        return torch.cat([_norms(block.to(dtype), P, q) for block, q in blocks])


def _norms(W: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """The norms (n,) of W (n, in) with the update, in the dtype of P (R, in) and Q (n, R)."""
    squares: Tensor = torch.linalg.vector_norm(W, dim=1, dtype=P.dtype).square_()
    cross = W @ P.t() if W.dtype == P.dtype else torch.mm(W, P.t().to(W.dtype), out_dtype=P.dtype)
    update = torch.addmm(cross, Q, P @ P.t(), beta=2).mul_(Q).sum(1)
    return squares.add_(update).clamp_(min=0).sqrt_()  # rounding may leave less than 0
