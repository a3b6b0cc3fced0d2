"""What a LLaMA-Adapter holds on one attention (arXiv:2303.16199): learned prompts and the gate of each head.

It is no change of a matrix, so it is no `Update`: nothing of it can be merged.
"""

import itertools

import torch
from torch import Tensor, nn

from ..errors import LoraError

_SERIAL = itertools.count()


class Prompts(nn.Module):
    """prompts (1, K, hidden), N(0, 1) at the start, and a gate at zero; fp32 masters.

    gate: "head", (1, heads, 1, 1), of which the factor is tanh(g), as published; or "layer", (1,), one for all heads,
    which is the factor itself, as in PEFT's adaption prompts.
    """

    def __init__(self, length: int, hidden: int, heads: int, gate: str, device: torch.device | None = None) -> None:
        super().__init__()
        shape = (1, heads, 1, 1) if gate == "head" else (1,)
        self.heads, self.rule = heads, gate
        self.prompts = nn.Parameter(torch.empty(1, length, hidden, device=device, dtype=torch.float32))
        self.gate = nn.Parameter(torch.zeros(shape, device=device, dtype=torch.float32))
        self._added: Tensor | None = None
        self.serial = next(_SERIAL)

    @property
    def added(self) -> Tensor | None:
        """What a condition adds to the prompts of one batch, (batch, 1 or K, hidden); no parameter, and in no file."""
        return self._added

    @added.setter
    def added(self, value: Tensor | None) -> None:
        self._added, self.serial = value, next(_SERIAL)  # what was kept of the prompts is of others now

    def reset_(self) -> None:
        """Draw the prompts and close the gate."""
        with torch.no_grad():
            self.prompts.normal_()
            self.gate.zero_()

    def inputs(self, like: Tensor) -> Tensor:
        """The prompts (1 or batch, K, hidden) that a batch sees, for hidden states `like`, in their dtype."""
        if self.prompts.is_meta and not like.is_meta:
            raise LoraError(
                "model: an adapter's prompts are on the meta device, and nothing brings them to where it runs; where "
                "accelerate offloads the model, do that first and inject then; else load the base's values, then inject"
            )
        prompts = self.prompts if self.added is None else self.prompts + self.added
        return prompts.to(like.device, like.dtype)

    def factors(self) -> Tensor:
        """The factor of each head, (1, heads)."""
        if self.rule == "head":
            return self.gate.tanh().view(1, self.heads)
        return self.gate.view(1, 1).expand(1, self.heads)

    def extra_repr(self) -> str:
        return f"prompts={self.prompts.shape[1]}, hidden={self.prompts.shape[2]}, heads={self.heads}, gate={self.rule}"
