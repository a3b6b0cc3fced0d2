"""What of the fast paths works on this machine, each tried by a tiny run: for `lora doctor`."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import lora

from ..bases import loadable
from ..bases.bitsandbytes import require_bitsandbytes
from ..errors import LoraError
from ..ops.operator import fused_linear
from .estimate import GIB
from .fit import free_memory
from .needs import check_optimizer
from .quiet import quiet

PACKAGES = (
    "lora-torch", "torch", "transformers", "accelerate", "datasets", "safetensors", "triton", "bitsandbytes",
    "liger-kernel", "peft",
)  # fmt: skip
THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
ROOM = 10 * GIB  # of disk, under which a base or its checkpoints may not fit


@dataclass(frozen=True)
class Finding:
    """One line of the report. ok: None where it is said and nothing is wrong; needed: without it nothing trains."""

    name: str
    ok: bool | None
    said: str
    needed: bool = False


class NotHere(Exception):
    """A path that cannot run, and what to do."""


def examine(model: str | None = None) -> Iterator[Finding]:
    """The findings, as they come.

    Args:
        model: whether its config can be read here, too.
    """
    yield Finding("versions", None, _versions())
    yield _tried("torch computes", _computes, needed=True)
    yield Finding("memory", None, f"{free_memory() / GIB:.1f} GiB free {'on the GPU' if _gpu() else 'on the machine'}")
    yield _tried("GPU", _card)
    yield _tried("bf16", _bf16)
    yield _tried("TF32", _tf32)
    yield _tried("Triton", _triton)
    yield _tried("fused operator", _fused)
    for name in loadable():
        yield _tried(f"{name} bases", partial(_quantized, name))
    yield _tried("8-bit AdamW", _eight_bit)
    yield _tried("Liger", _liger)
    yield _tried("flash attention", _flash)
    yield Finding("torch.compile", *_compiler())
    yield Finding("threads", None, _threads())
    yield _tried("disk", _disk)
    yield _tried("cache", _cache)
    if model is not None:
        yield _tried("model", partial(_model, model), needed=True)


def _tried(name: str, attempt: Callable[[], str], needed: bool = False) -> Finding:
    """Any failure of a tiny run is what the report is for: its kind and first line are told."""
    try:
        with quiet():
            return Finding(name, True, attempt(), needed)
    except (NotHere, LoraError) as error:
        return Finding(name, False, str(error), needed)
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return Finding(name, False, f"failed with {type(error).__name__}: {first[:200]}", needed)


def _gpu() -> bool:
    return torch.cuda.is_available()


def _device() -> str:
    return "cuda" if _gpu() else "cpu"


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} -")
    return ", ".join(found)


def _computes() -> str:
    x = torch.ones(8, 8, device=_device())
    if not torch.equal(x @ x, torch.full_like(x, 8)):
        raise NotHere("a product of ones is wrong; install torch again")
    return f"on {_device()}"


def _card() -> str:
    if not _gpu():
        built = torch.version.cuda
        why = "torch is built without CUDA" if built is None else "torch finds no GPU: see nvidia-smi and its driver"
        raise NotHere(f"{why}; runs go on the CPU")
    parts = torch.cuda.get_device_properties(0)
    others = f", {torch.cuda.device_count()} of them (a run takes one)" if torch.cuda.device_count() > 1 else ""
    return f"{parts.name}, {parts.total_memory / GIB:.0f} GiB, capability {parts.major}.{parts.minor}{others}"


def _bf16() -> str:
    if not _gpu():
        return "runs on the CPU, in software on most; fp32 is the default there"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise NotHere("the GPU has none; give --dtype fp16")
    return "supported"


def _tf32() -> str:
    if not _gpu():
        raise NotHere("only on a GPU")
    on = torch.backends.cuda.matmul.allow_tf32
    return f"{'on' if on else 'off'} for products of fp32 (bf16 runs do not need it)"


def _triton() -> str:
    if find_spec("triton") is None:
        raise NotHere("not installed; pip install 'lora-torch[fast]'")
    if not _gpu():
        raise NotHere("installed; its kernels need a GPU")
    return "installed"


def _fused() -> str:
    """One call and its backward pass, beside plain torch."""
    dtype = torch.bfloat16 if _gpu() else torch.float32
    x, W = (torch.randn(16, 64, device=_device(), dtype=dtype) for _ in range(2))
    A, B = torch.randn(8, 64, device=_device(), requires_grad=True), torch.zeros(16, 8, device=_device())
    B.requires_grad_()
    [y] = fused_linear(x, [W], None, [[A]], [[B]], [[1.0]])
    torch.autograd.backward(y.float().sum())
    assert B.grad is not None
    off = ((y - x @ W.t()).float().norm() / y.float().norm()).item()
    exact = (x.float() @ A.detach().t()).sum(0)
    off = max(off, ((B.grad[0] - exact).norm() / exact.norm()).item())
    if not off < 0.02:
        raise NotHere(f"its results are off by {off:.1%} from plain torch; report it, and set no dtype but fp32")
    if not _gpu():
        raise NotHere("right in plain torch; its kernels need a GPU")
    return "its kernels run, and agree with plain torch"


def _quantized(name: str) -> str:
    require_bitsandbytes(f"{name} bases")
    linear = loadable()[name].sample(name, 64, 128).to(torch.bfloat16).to(_device())
    net = lora.inject(torch.nn.Sequential(linear), r=4, targets=["0"])
    net(torch.randn(4, 64, device=_device(), dtype=torch.bfloat16)).sum().backward()
    return f"a small linear was quantized and adapted on {_device()}"


def _eight_bit() -> str:
    check_optimizer("adamw_8bit", _gpu())
    return "one step was taken"


def _liger() -> str:
    if find_spec("liger_kernel") is None:
        raise NotHere("not installed; pip install 'lora-torch[fast]' for less memory on a GPU")
    if not _gpu():
        raise NotHere("installed; its kernels need a GPU")
    from importlib import import_module

    norm: Any = import_module("liger_kernel.transformers.rms_norm").LigerRMSNorm(64).to("cuda")
    norm(torch.randn(4, 64, device="cuda", requires_grad=True)).sum().backward()
    return "its norm ran"


def _flash() -> str:
    if not _gpu():
        raise NotHere("only on a GPU; the CPU has a fused form of its own")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(1, 2, 16, 64, device="cuda", dtype=torch.float16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    return "torch's own runs"


def _compiler() -> tuple[bool | None, str]:
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return False, "needs a C compiler, and there is none (so do Triton's kernels); install gcc"
    return None, "a C compiler is there; a run does not use it"


def _threads() -> str:
    given = ", ".join(f"{name}={os.environ[name]}" for name in THREADS if name in os.environ) or "nothing is set"
    return f"{torch.get_num_threads()} of {os.cpu_count()} processors; {given}"


def _disk() -> str:
    return _space(Path.cwd())


def _cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    place = Path(HF_HUB_CACHE)
    there = next(p for p in (place, *place.parents) if p.exists())
    if not os.access(there, os.W_OK):
        raise NotHere(f"{place} cannot be written, so that no model can be fetched; set HF_HOME to another folder")
    return f"{place}, {_space(there)}{', offline (HF_HUB_OFFLINE)' if HF_HUB_OFFLINE else ''}"


def _space(place: Path) -> str:
    free = shutil.disk_usage(place).free
    if free < ROOM:
        raise NotHere(f"only {free / GIB:.1f} GiB free in {place}; a base and its checkpoints may need more")
    return f"{free / GIB:.0f} GiB free in {place}"


def _model(name: str) -> str:
    from .base import check_quantization, load_config

    with _offline():
        config = load_config(name)
        stored, _ = check_quantization(name, "none")
    return f"{name}: {config.model_type}, {'not quantized' if stored is None else stored}"


@contextmanager
def _offline() -> Iterator[None]:
    """No network: a model that is not here yet is told so."""
    import huggingface_hub.constants as constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
