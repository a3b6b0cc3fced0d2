"""An input that need not be saved: autograd holds the factors that it is the product of, and they outlive our backward.

The down projection's input is silu(gate) * up, the widest tensor of a layer. The node that made it keeps what it needs
for its own backward pass, which runs after ours, since our dx feeds it. So x is made again from that, and each layer
holds 2 n intermediate bytes less. A backward pass through that node alone, before ours, frees it; ours then fails as
every second backward pass through a graph does.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rehearsal

_PRODUCT = "MulBackward0"
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


class Factors(NamedTuple):
    """x = left * right, or silu(left) * right, silu rounded to x's dtype before the product; both (n, K)."""

    left: Tensor
    right: Tensor
    silu: bool

    def product(self) -> Tensor:
        return (torch.nn.functional.silu(self.left) if self.silu else self.left) * self.right


class Remake(NamedTuple):
    """Where the factors of x are found during its consumer's backward pass."""

    node: Any
    shape: torch.Size

    def factors(self) -> Factors:
        left, right = _kept(self.node)
        return Factors(left.view(self.shape), right.view(self.shape), self.node.name() != _PRODUCT)


def remake(x: Tensor) -> Remake | None:
    """How to make x (n, K) again, or None where it must be saved.

    Known are a product of two tensors of x's size, and Liger's SwiGLU. None also while tracing; where x was changed in
    place, which its node need not know; and under saved-tensor hooks (checkpointing, offload), now or when the node was
    made, where what it holds may be read only once.
    """
    node: Any = None if x.is_inference() or x._version else x.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    if node is None or type(x) is not Tensor or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    if node.name() == _PRODUCT:
        saved = node._raw_saved_self, node._raw_saved_other
    elif node.name() == "LigerSiLUMulFunctionBackward":
        if any(getattr(node, name, 1.0) != 1.0 for name in ("gate_multiplier", "down_multiplier")):
            return None
        saved = node._raw_saved_tensors
    else:
        return None
    if any(getattr(tensor, "unpack_hook", None) is not None for tensor in saved):
        return None  # a torch that does not show its hooks fails loudly in backward
    factors = _kept(node)
    alike = [isinstance(f, Tensor) and f.numel() == x.numel() and f.dtype == x.dtype for f in factors]
    if alike != [True, True] or not all(f.is_contiguous() for f in factors):
        return None
    found = Remake(node, x.shape)
    return found if node.name() == _PRODUCT or _is_swiglu(found, x) else None


def _kept(node: Any) -> tuple[Any, ...]:
    return (node._saved_self, node._saved_other) if node.name() == _PRODUCT else node.saved_tensors


_SWIGLU: dict[type, bool] = {}
"""By class of node, whether what it computes was seen to be silu(left) * right."""


def _is_swiglu(found: Remake, x: Tensor) -> bool:
    """Whether a node of that name computes what it did in the versions of Liger that are known; asked once a class."""
    kind = type(found.node)
    if rehearsal.watched(x):
        return True  # without values there is nothing to see; the rehearsal's node stands for Liger's
    if kind not in _SWIGLU:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        row = x[:1].detach()
        if not row.any():
            return False  # nothing to tell by; x is saved
        left, right, silu = found.factors()
        error = Factors(left[:1], right[:1], silu).product().detach().float() - row.float()
        _SWIGLU[kind] = bool(error.norm() <= 0.02 * row.float().norm())  # of the row's own size, however small
    return _SWIGLU[kind]
