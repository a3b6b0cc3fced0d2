"""Every kernel compiles for cards that are not at hand, and fits their shared memory with the blocks of `tuning`."""

import importlib.util
import os
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

CARDS = {  # compute capability: KiB of shared memory a program may have, multiprocessors
    80: (163, 108),  # A100
    89: (99, 128),  # L4, RTX 4090
    90: (227, 132),  # H100, H200
    100: (227, 148),  # B200
    120: (99, 170),  # RTX 5090
}
POINTERS = {
    "seed_ptr": "*i64",
    "codes_ptr": "*i8",
    "code_ptr": "*fp32",
    "scales_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "packed_ptr": "*i32",
}
FLOATS = ("g_partial_ptr", "dB_partial_ptr", "dB_ptr", "partial_ptr", "absmax2_ptr", "code2_ptr", "offset_ptr")


def shared_memory(kernel: Any, arch: int, constants: dict[str, Any], warps: int, stages: int, **options: Any) -> int:
    """Bytes of shared memory of a kernel compiled for bf16 tensors; numbers are taken to be multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_desc"):
            return f"tensordesc<bf16{options['blocks'][name]}>"
        if name.endswith("_ptr"):
            return POINTERS.get(name) or ("*fp32" if name in FLOATS else options.get(name, "*bf16"))
        return "fp32" if name == "inv_keep" else "i32"

    names = kernel.arg_names
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if kind(n)[0] in "*i" and n != "threshold"}
    source = ASTSource(
        kernel,
        {name: kind(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attrs,
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    return int(compiled.metadata.shared)


class Operand:
    """What `tuning` asks of a tensor."""

    is_cuda, device = True, None

    def __init__(self, columns: int) -> None:
        self.shape = (8192, columns)

    def element_size(self) -> int:
        return 2


@pytest.fixture(params=[arch if arch in (80, 90) else pytest.param(arch, marks=pytest.mark.slow) for arch in CARDS])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """(compute capability, bytes of shared memory a program may have)"""
    from lora.kernels import tuning

    kibibytes, processors = CARDS[request.param]
    found = types.SimpleNamespace(
        shared_memory_per_block_optin=kibibytes * 1024, multi_processor_count=processors, major=request.param // 10
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    tuning.card.cache_clear()
    yield request.param, kibibytes * 1024
    tuning.card.cache_clear()


@pytest.mark.parametrize("card", [90], indirect=True)
@pytest.mark.parametrize(("columns", "rank"), [(1024, 16), (4096, 16), (4096, 32)])
def test_gradients_on_hopper(card: tuple[int, int], columns: int, rank: int) -> None:
    from lora.kernels.gradients import finish_kernel, gradients_kernel
    from lora.kernels.tuning import gradients_config

    arch, memory = card
    c: Any = gradients_config(Operand(columns), rank)  # type: ignore[arg-type]
    constants = {"EVEN": False, "BM": c["BM"], "BC": c["BC"], "BR": c["BR"], "PRECISION": "tf32"}
    thin = {"g_ptr": "*fp32", "out_ptr": "*fp32"}
    assert 0 < shared_memory(gradients_kernel, arch, constants, c["warps"], c["stages"], **thin) <= memory
    assert shared_memory(finish_kernel, arch, {"BLOCK": 256}, 2, 2) <= memory


@pytest.mark.parametrize(("rank", "dropout"), [(16, False), (64, False), (200, False), (16, True), (200, True)])
def test_shrink_and_outer(card: tuple[int, int], rank: int, dropout: bool) -> None:
    from lora.kernels.outer import outer_kernel
    from lora.kernels.shrink import shrink_kernel
    from lora.kernels.tuning import outer_config, shrink_config

    arch, memory = card
    x: Any = Operand(4096)
    shared = {"DROPOUT": dropout, "EVEN": False, "PRECISION": "tf32"}
    c = outer_config(x, rank, dropout)
    constants = shared | {"BN": c["BN"], "BR": c["BR"]}
    used = shared_memory(outer_kernel, arch, constants, c["warps"], c["stages"], out_ptr="*fp32")
    assert 0 < used <= memory
    c = shrink_config(x, rank, dropout)
    constants = shared | {"TALL": rank == 64, "SPLITS": c["SPLITS"], "BM": c["BM"], "BR": c["BR"]}
    out = "*bf16" if c["SPLITS"] == 1 else "*fp32"
    assert 0 < shared_memory(shrink_kernel, arch, constants, c["warps"], c["stages"], out_ptr=out) <= memory


def test_gemm_on_hopper() -> None:
    from lora.kernels.gemm import gemm_kernel
    from lora.kernels.tuning import gemm_config

    c = gemm_config()
    bm, bn, bk = c["BM"], c["BN"], c["BK"]
    blocks = {"x_desc": [bm, bk], "w_desc": [bk, bn], "h_desc": [bm, bk], "b_desc": [bk, bn], "y_desc": [bm, bn]}
    constants = {"BM": bm, "BN": bn, "BK": bk, "GROUP_M": c["GROUP_M"], "PROGRAMS": 132}
    used = shared_memory(gemm_kernel, 90, constants, c["warps"], c["stages"], blocks=blocks)
    assert 0 < used <= CARDS[90][0] * 1024


def test_the_kernels_without_shared_blocks(card: tuple[int, int]) -> None:
    from lora.kernels.copies import dropped_kernel, product_kernel
    from lora.kernels.dequantize import FOUR_BIT, INT8, dequantize_4bit_kernel, dequantize_int8_kernel
    from lora.kernels.expand import expand_kernel
    from lora.kernels.reduce import reduce_kernel
    from lora.kernels.scale import COLUMNS, ROWS, scale_backward_kernel, scale_kernel

    arch, memory = card
    for kernel, constants, warps in (
        (expand_kernel, {"BM": 32, "BR": 64, "PRECISION": "tf32"}, 4),
        (dropped_kernel, {"EVEN": False, "BM": 16}, 4),
        (product_kernel, {"SILU": True, "BLOCK": 2048}, 4),
        (reduce_kernel, {"SCALED": True, "BLOCK": 256}, 2),
        (scale_kernel, {"BIAS": True, "BM": ROWS, "BC": COLUMNS}, 4),
        (scale_backward_kernel, {"BM": ROWS, "BC": COLUMNS}, 4),
        (dequantize_int8_kernel, {"COLUMNS": INT8["COLUMNS"]}, INT8["warps"]),
        (dequantize_4bit_kernel, {"BLOCK": 64, "NESTED": 256, "WORDS": FOUR_BIT["WORDS"], "EVEN": True}, 4),
    ):
        assert shared_memory(kernel, arch, constants, warps, 2, absmax_ptr="*u8") <= memory, kernel
