"""DoRA (Liu et al., 2024, arXiv:2402.09353): the low-rank update turns the rows of W0, a trained vector stretches them.

    W = m * V / ||V||        V = W0 + s B A, ||V|| by row, a constant in the backward pass        m: (out,)

m starts at ||W0||, so that a fresh adapter changes nothing. Under dropout the update alone sees the dropped input, as
in plain LoRA.
"""

import torch
from torch import Tensor, nn

from ..bases import FrozenWeight, brought
from ..errors import LoraError
from ..ops.row_norms import row_norms
from .low_rank import LowRank
from .update import Start, register


@register
class DoRA(LowRank):
    """A (r, in), B (out, r) and the magnitude m (out,), fp32."""

    name, note = "dora", "DoRA"
    scales = True

    def __init__(self, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0, bias: Tensor | None = None) -> None:
        super().__init__(A, B, scaling, dropout, bias)
        self.magnitude = nn.Parameter(torch.empty(B.shape[0], device=B.device, dtype=torch.float32))

    @classmethod
    def fresh(cls, weight: FrozenWeight, start: Start) -> "DoRA":
        if hasattr(weight.parameter, "full_tensor"):
            raise LoraError(
                "dora: the weight is sharded (FSDP2), and its norms need the whole; inject first, then shard"
            )
        part = super().fresh(weight, start)
        if start.init is not None and not part.magnitude.is_meta:
            with brought(weight.module):
                part.magnitude = nn.Parameter(part.norms(weight))
        return part

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors()
        found["lora_magnitude_vector"] = found.pop("magnitude")
        return found

    def norms(self, weight: FrozenWeight, dtype: torch.dtype = torch.float32) -> Tensor:
        """||V|| (out,). Of a quantized W0 in fp32, since the dtype of its products differs from call to call."""
        dense = weight.dense(torch.float32 if weight.quantization else None)
        return row_norms(dense, self.pairs(), dtype)

    def output_scale(self, weight: FrozenWeight, dtype: torch.dtype = torch.float32) -> Tensor:
        """m / ||V|| (out,); 0 for a row of V that is all zeros, whose m starts at 0."""
        magnitude = self.magnitude.to(dtype)
        norms = self.norms(weight, dtype).to(magnitude.device)
        scale = magnitude / norms.masked_fill(norms == 0, 1)
        # m holds fp32's rounding of a norm, which in float64 would be a change of W0 by that rounding.
        return scale if dtype == torch.float32 else scale.masked_fill(self.output_scale(weight) == 1, 1)
