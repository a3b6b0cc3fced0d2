"""What a LLaMA-Adapter holds on one attention (arXiv:2303.16199): learned prompts and the gate of each head.

It is no change of a matrix, so it is no `Update`: nothing of it can be merged.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraError
from .features import Condition, Encoder


class Prompts(nn.Module):
    """prompts (1, K, hidden), N(0, 1) at the start, and a gate at zero; fp32 masters.

    gate: "head", (1, heads, 1, 1), of which the factor is tanh(g), as published; or "layer", (1,), one for all heads,
    which is the factor itself, as in PEFT's adaption prompts.
    reads: whether features are added to the prompts. bare: no prompts, and what the features give in their place.
    """

    prompts: nn.Parameter | None
    features: Encoder | None

    def __init__(
        self, length: int, hidden: int, heads: int, gate: str, device: torch.device | None = None, *,
        reads: bool = False, bare: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        shape = (1, heads, 1, 1) if gate == "head" else (1,)
        self.heads, self.rule, self.shape, self.reads = heads, gate, (1, length, hidden), reads
        made: nn.Parameter | None = (
            None if bare else nn.Parameter(torch.empty(self.shape, device=device, dtype=torch.float32))
        )
        self.register_parameter("prompts", made)
        self.features = None  # of the adapter's lowest layer that reads features, for all of them
        self.gate = nn.Parameter(torch.zeros(shape, device=device, dtype=torch.float32))
        self._condition: Condition | None = None
        self.change()

    @property
    def condition(self) -> Condition | None:
        """The features of the batch, within a `condition` block; no parameter, and in no file."""
        return self._condition

    @condition.setter
    def condition(self, value: Condition | None) -> None:
        self._condition = value
        self.change()

    def change(self) -> None:
        """Part from what was kept of the prompts: it has another `stamp`.

        A stamp is a tensor of nothing, told by being the same object: no copy has it, no two adapters do, and code that
        torch.compile made asks for it without being made anew for each, as for a number.
        """
        self.stamp = torch.empty(0, device="cpu")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_condition": None}  # a copy would answer about these features for ever

    def reset_(self) -> None:
        """Draw the prompts and what encodes features, and close the gate."""
        with torch.no_grad():
            if self.prompts is not None:
                self.prompts.normal_()
            if self.features is not None:
                self.features.reset_()
            self.gate.zero_()

    def inputs(self, like: Tensor) -> Tensor:
        """The prompts (1 or batch, K, hidden) that a batch sees, for hidden states `like`, in their dtype."""
        if self.gate.is_meta and not like.is_meta:
            raise LoraError(
                "model: an adapter's prompts are on the meta device, and nothing brings them to where it runs; where "
                "accelerate offloads the model, do that first and inject then; else load the base's values, then inject"
            )
        prompts: Tensor | None = self.prompts
        if self.reads:
            if self.condition is None:
                raise LoraError(
                    "features: the adapter that acts answers about features, and this call has none; run the model "
                    "within lora.llama_adapter.condition(model, features), or lora.activate another adapter"
                )
            encoded = self.condition.tokens(len(like)).to(self.gate.device)
            prompts = encoded if prompts is None else prompts + encoded
        assert prompts is not None
        return prompts.to(like.device, like.dtype)

    def factors(self) -> Tensor:
        """The factor of each head, (1, heads)."""
        if self.rule == "head":
            return self.gate.tanh().view(1, self.heads)
        return self.gate.view(1, 1).expand(1, self.heads)

    def extra_repr(self) -> str:
        return f"prompts={self.shape[1]}, hidden={self.shape[2]}, heads={self.heads}, gate={self.rule}"
