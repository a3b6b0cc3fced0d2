"""Checkpointing whose saved inputs wait in pinned host memory: a layer keeps nothing on the GPU between its passes.

The copy out runs on a stream of its own while the layer computes; in the backward pass each input is fetched while the
layer after it computes. So a layer must not change its input in place.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

SMALLEST = 1 << 20  # bytes; less than this is not worth a copy


class Parked:
    """One saved tensor in host memory, and the one that was saved before it, which will be wanted after it."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream, before: "weakref.ref[Parked] | None") -> None:
        self.device, self.stream, self.before = tensor.device, stream, before
        self.fetched: Tensor | None = None
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def fetch(self) -> None:
        if self.fetched is None:
            with torch.cuda.stream(self.stream):
                self.fetched = self.host.to(self.device, non_blocking=True)

    def get(self) -> Tensor:
        self.fetch()
        tensor, self.fetched = self.fetched, None
        assert tensor is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        tensor.record_stream(current)
        before = self.before() if self.before is not None else None
        if before is not None:
            before.fetch()
        return tensor


class Offload:
    """A checkpoint function for `prepare`: non-reentrant, its saved CUDA inputs parked in pinned host memory."""

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.last: weakref.ref[Parked] | None = None

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The hooks see the layer's inputs alone: what is saved inside it is checkpoint's own affair.
        with saved_tensors_hooks(self._pack, lambda saved: saved.get() if isinstance(saved, Parked) else saved):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Offload":
        return Offload()

    def _pack(self, tensor: Tensor) -> Tensor | Parked:
        if not tensor.is_cuda or tensor.nbytes < SMALLEST or isinstance(tensor, torch.nn.Parameter):
            return tensor
        stream = self.streams.get(tensor.device)
        if stream is None:
            stream = self.streams[tensor.device] = torch.cuda.Stream(tensor.device)
        parked = Parked(tensor, stream, self.last)
        self.last = weakref.ref(parked)
        return parked
