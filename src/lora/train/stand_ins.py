"""What runs on a card in another form than on the meta device: attention, Liger's kernels, parked checkpoints.

Each stand-in allocates and keeps what the original does and computes nothing.
"""

import functools
import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..layers.host import original_class
from ..ops.offload import SMALLEST

FLASH_DTYPES = (torch.float16, torch.bfloat16)
aten = torch.ops.aten


class _FullRows(TorchFunctionMode):
    """A question about values ("are all rows full?") is answered with yes: they are, and none is packed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def attention(card: bool) -> Iterator[None]:
    """Within it, scaled_dot_product_attention of meta tensors is the fused form that a card, or a CPU, would take."""
    original = functional.scaled_dot_product_attention  # a mode would not reach what is run again in a backward pass

    def stand_in(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not query.is_meta:
            return original(query, *args, **kwargs)
        return (_on_card if card else _on_cpu)(query, *args, **kwargs)

    functional.scaled_dot_product_attention = stand_in
    try:
        with _FullRows():
            yield
    finally:
        functional.scaled_dot_product_attention = original


def _on_card(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    head = query.shape[-1]
    scale = head**-0.5 if scale is None else scale
    padded = [pad(t, (0, -t.shape[-1] % 8)) if t.shape[-1] % 8 else t for t in (query, key, value)]
    if attn_mask is None and query.dtype in FLASH_DTYPES and head == value.shape[-1] <= 256:
        out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
    else:
        if enable_gqa:
            times = query.shape[1] // key.shape[1]
            padded[1:] = [t.repeat_interleave(times, 1) for t in padded[1:]]
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        out = aten._scaled_dot_product_efficient_attention(*padded, bias, True, dropout_p, is_causal, scale=scale)[0]
    whole: Tensor = out
    return whole if whole.shape[-1] == value.shape[-1] else whole[..., : value.shape[-1]]


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask of booleans becomes numbers in each layer; its rows start on 16 bytes."""
    bias = mask.to(query.dtype) if mask.dtype == torch.bool else mask
    more = -bias.shape[-1] % 8
    bias = pad(bias, (0, more))[..., : key.shape[-2]] if more else bias
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _on_cpu(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    fused = query.shape[-1] == value.shape[-1] and not dropout_p
    if enable_gqa and not fused:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if fused:
        mask = attn_mask.to(query.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
        out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
        )[0]
        return out
    out = aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]
    return out


# Liger's kernels, as its own patches put them into a model; in place where they are.


class LigerSiLUMulFunction(torch.autograd.Function):
    """silu(a) * b, whose gradients overwrite a and b. Its name is how `ops.recompute` knows it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.empty_like(a)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return a, b


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy.contiguous(), torch.empty_like(ctx.saved_tensors[1])


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rows_first(q), _rows_first(k)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return _rows_first(dq), _rows_first(dk), None, None


def _rows_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


class _Loss(torch.autograd.Function):
    """The head and the cross entropy by chunks of rows: the logits of one chunk at a time, and dx made at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows, width = x.shape
        factor = -(-weight.shape[0] // width)
        chunk = 1 << (-(-rows // factor) - 1).bit_length()
        dx, losses = torch.zeros_like(x), x.new_zeros(rows, dtype=torch.float32)
        for start in range(0, rows, chunk):
            logits = x[start : start + chunk] @ weight.t()
            dx[start : start + chunk] = logits @ weight
        ctx.save_for_backward(dx)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def use_liger(model: Any) -> None:
    """Give a model on the meta device the stand-ins of what Trainer's `use_liger_kernel` would patch."""
    home = importlib.import_module(type(model).__module__)
    for module in model.modules():
        kind = original_class(module).__name__  # of an adapted attention as well
        parts = {"gate_proj", "up_proj", "down_proj"} <= module._modules.keys()
        if kind.endswith("RMSNorm") and isinstance(module._parameters.get("weight"), Tensor):
            module.forward = functools.partial(_norm, module)
        elif parts and not hasattr(module, "experts"):
            module.forward = MethodType(_mlp, module)
        elif kind.endswith("Attention") and hasattr(home, "apply_rotary_pos_emb"):
            module.forward = _with_rotation(home, module.forward)
    head = model.get_output_embeddings()
    if head is not None:
        model.forward = functools.partial(_fused_loss, model, head)


def _norm(module: Any, x: Tensor) -> Tensor:
    return _Norm.apply(x, module.weight)  # type: ignore[no-any-return, no-untyped-call]


def _mlp(module: Any, x: Tensor) -> Any:
    return module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-untyped-call]


def _with_rotation(home: Any, forward: Any) -> Any:
    def rotated(*args: Any, **kwargs: Any) -> Any:
        original = home.apply_rotary_pos_emb
        home.apply_rotary_pos_emb = lambda q, k, cos, sin, *_, **__: _Rotate.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
        try:
            return forward(*args, **kwargs)
        finally:
            home.apply_rotary_pos_emb = original

    return rotated


def _fused_loss(model: Any, head: Any, labels: Tensor, **inputs: Any) -> dict[str, Tensor]:
    hidden = model.base_model(**inputs)[0]
    return {"loss": _Loss.apply(hidden.view(-1, hidden.shape[-1]), head.weight)}  # type: ignore[no-untyped-call]


# Checkpoints in host memory.


class Parked:
    """An input that waits elsewhere: the memory that it takes comes again when it, or the one after it, is wanted."""

    def __init__(self, tensor: Tensor, before: "weakref.ref[Parked] | None") -> None:
        self.shape, self.dtype, self.before = tensor.shape, tensor.dtype, before
        self.fetched: Tensor | None = None

    def fetch(self) -> None:
        if self.fetched is None:
            self.fetched = torch.empty(self.shape, dtype=self.dtype, device="meta")

    def get(self) -> Tensor:
        self.fetch()
        tensor, self.fetched = self.fetched, None
        assert tensor is not None
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return tensor


class Offload:
    """`ops.offload.Offload` on the meta device."""

    def __init__(self) -> None:
        self.last: weakref.ref[Parked] | None = None

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(self._pack, lambda saved: saved.get() if isinstance(saved, Parked) else saved):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def _pack(self, tensor: Tensor) -> Tensor | Parked:
        if tensor.nbytes < SMALLEST or isinstance(tensor, nn.Parameter):
            return tensor
        parked = Parked(tensor, self.last)
        self.last = weakref.ref(parked)
        return parked
