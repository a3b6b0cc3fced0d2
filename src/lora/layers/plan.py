"""The choice: what runs for a linear host and this input, and why. The host executes it, the summary prints it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import rehearsal
from ..ops.dequantize import has_triton

DEVICES = ("cuda",)
HAS_TRITON = has_triton()  # a constant, so that a traced call need not ask
DTYPES = (torch.bfloat16, torch.float16)


class Plan(NamedTuple):
    """How the host computes.

    fused: one operator on the kernels, for all hosts that are fed this tensor.
    operator: the same operator in plain torch, over a quantized weight where the kernels do not run.
    plain: the base's own product and the update, in plain torch.
    apart: the base's product first, whoever computes it, and the updates on top.
    """

    path: str
    why: str  # what keeps the host from running fused; "" where it does


FUSED = Plan("fused", "")
OWN = Plan("apart", "in eval mode the base's product is left to the library that quantized it")
SEVERAL = Plan("apart", "several updates act, of which one scales the output")
ON_CPU = Plan("plain", "on cpu")


def plan(host: nn.Module, adapters: Any, x: Tensor) -> Plan:
    """How this host runs for an input x (..., in). Within compiled code it is asked while that is traced."""
    if adapters.scaled and len(adapters.terms) > 1:
        return SEVERAL
    quantized: bool = adapters.quantized
    if not quantized and x.is_cpu and "cpu" not in DEVICES:
        return ON_CPU  # at once: small models on a CPU feel each microsecond
    if quantized and adapters.frozen.runs_own_forward(host, x):
        return OWN
    why = _why_not_fused(host, adapters, x)
    if why is None:
        return FUSED
    if not quantized:
        return Plan("plain", why)
    one_dropout = not host.training or len({term.dropout for term in adapters.terms}) == 1
    return Plan("operator" if one_dropout else "apart", why)


def _why_not_fused(host: nn.Module, adapters: Any, x: Tensor) -> str | None:
    weight = adapters.frozen
    kind, dtype = rehearsal.device_type(x), weight.compute_dtype(x)
    if kind not in DEVICES:
        return f"on {kind}"
    if dtype not in DTYPES:
        return f"{str(dtype)[6:]} compute"
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    if not adapters.quantized and not weight.dtype == dtype == autocast:  # a quantized one is made in any dtype
        return "autocast over weights of another dtype"
    if not HAS_TRITON and not rehearsal.on_card(x):
        return "triton is not installed"
    if host.training and len({term.dropout for term in adapters.terms}) > 1:
        return "active adapters with different dropout"
    return None
