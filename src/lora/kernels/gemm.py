"""The large product with the low-rank term in its accumulator: a persistent Hopper GEMM fed by TMA."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tuning import Config, card, cdiv, gemm_config


@triton.jit
def gemm_kernel(
    x_desc, w_desc, h_desc, b_desc, y_desc,
    n, width, depth, rank,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """y = x W + h B: x (n, depth), W (depth, width), h (n, R), B (R, width), y (n, width).

    The low-rank part is a few more steps of the same loop, which then read through two other descriptors: no bubble,
    and the flattened loop keeps loads in flight from tile to tile. 2 n depth width operations, 275 G at 8192 x
    4096 x 4096; it moves 2 (n depth + depth width + n width) bytes, 168 MB.
    """
    tiles_m = tl.cdiv(n, BM)
    tiles_n = tl.cdiv(width, BN)
    steps = tl.cdiv(depth, BK)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        per_group = GROUP_M * tiles_n
        first = tile // per_group * GROUP_M
        size = tl.minimum(tiles_m - first, GROUP_M)
        row = (first + tile % per_group % size) * BM
        col = tile % per_group // size * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, steps + tl.cdiv(rank, BK)):
            if k < steps:
                left, right, at = x_desc, w_desc, k * BK
            else:
                left, right, at = h_desc, b_desc, (k - steps) * BK
            acc = tl.dot(left.load([row, at]), right.load([at, col]), acc)
        y_desc.store([row, col], acc.to(y_desc.dtype))


def can_describe(*tensors: Tensor) -> bool:
    """Whether TMA can read these matrices: unit column stride, rows and base on 16 bytes."""
    return all(t.stride(1) == 1 and not (t.stride(0) * t.element_size() | t.data_ptr()) % 16 for t in tensors)


def gemm_(y: Tensor, x: Tensor, w: Tensor, h: Tensor, b: Tensor, config: Config | None = None) -> Tensor:
    """Write x w + h b into y (n, width): x (n, depth), w (depth, width), h (n, R), b (R, width), as `can_describe`."""
    (n, depth), rank, width = x.shape, h.shape[1], y.shape[1]
    if n == 0:
        return y
    config = config or gemm_config()
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    describe = TensorDescriptor.from_tensor
    tiles = cdiv(n, bm) * cdiv(width, bn)
    programs = min(card(x.device).processors if x.is_cuda else 4, tiles)
    gemm_kernel[(programs,)](
        describe(x, [bm, bk]), describe(w, [bk, bn]), describe(h, [bm, bk]), describe(b, [bk, bn]),
        describe(y, [bm, bn]), n, width, depth, rank,
        BM=bm, BN=bn, BK=bk, GROUP_M=config["GROUP_M"], PROGRAMS=programs,
        num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip
    return y
