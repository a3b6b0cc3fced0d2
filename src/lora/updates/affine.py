"""A scale and a bias for each output (LLaMA-Adapter V2, Gao et al., 2023, arXiv:2304.15010): y = s * (W0 x + b0 + b).

s starts at 1 and b at 0, so that a fresh one changes nothing. b0: the host's own bias, where it has one.
"""

import torch
from torch import Tensor, nn

from ..bases import FrozenWeight
from .update import Pair, Start, Update, register


@register
class Affine(Update):
    """s (out,) and b (out,), fp32. It has no low-rank term; a pair of zeros stands for one, and is in no file."""

    name, note = "affine", "scale, bias"
    scales = True
    scaling, dropout = 1.0, 0.0

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(out_features, device=device))
        self.added = nn.Parameter(torch.zeros(out_features, device=device))
        self.register_buffer("A", torch.zeros(1, in_features, device=device), persistent=False)
        self.register_buffer("B", torch.zeros(out_features, 1, device=device), persistent=False)

    @classmethod
    def fresh(cls, weight: FrozenWeight, start: Start) -> "Affine":
        out_features, in_features = weight.shape
        device = weight.device
        if start.init is None and device.type == "meta":
            device = torch.device("cpu")
        return cls(out_features, in_features, device)

    def pairs(self) -> tuple[Pair]:
        return ((self._buffers["A"], self._buffers["B"], 1.0),)  # type: ignore[return-value]

    def output_scale(self, weight: FrozenWeight, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.scale.to(dtype)

    def shift(self, bias: Tensor | None) -> Tensor:
        """s * b + (s - 1) * b0: what it adds to the host's bias."""
        added = self.scale * self.added
        return added if bias is None else added + (self.scale - 1) * bias.float()

    def tensors(self) -> dict[str, Tensor]:
        return {"adaption_scale": self.scale, "adaption_bias": self.added}

    def extra_repr(self) -> str:
        return f"out={len(self.scale)}"
