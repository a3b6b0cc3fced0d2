"""The lookup table: row t of the stored weight for token t, which is W0 x for the one-hot x of the token.

W0 is seen as (dim, tokens), so that the formula and the files are those of every matrix: A (r, tokens), B (dim, r). A
starts at zero, as in loralib, so that a token that training never sees keeps the base's row, to the bit.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding

from ..errors import LoraError
from ..ops import as_dtype
from ..ops.lora_linear import refuse_meta
from .host import LoraLayer
from .kind import register
from .matrix import MatrixKind, apart, refuse_replica


class LoraEmbedding(LoraLayer):
    """A lookup table while its adapters act."""

    def forward(self, input: Tensor) -> Tensor:
        adapters: Any = self._modules["lora"]
        refuse_replica(self)
        adapters.check_size("a table under an adapter")
        y: Tensor = adapters.original.forward(self, input)  # (..., dim)
        host: Any = self
        y, pairs = apart(y, adapters.terms, adapters.frozen)
        flat = y.view(-1, y.shape[-1])
        for term, (A, B, s) in pairs:
            refuse_meta(A, input)
            # A^T's rows are gathered, as the table's are; a padding token has no gradient there either.
            h = embedding(input.reshape(-1), A.t(), host.padding_idx, scale_grad_by_freq=host.scale_grad_by_freq)
            if self.training and term.dropout:  # of the one-hot input: its only element that is not zero
                h = h * dropout(h.new_ones(h.shape[0], 1), term.dropout)
            flat = flat.addmm_(as_dtype(h, y.dtype), as_dtype(B, y.dtype).t(), alpha=s)
        return flat.view(y.shape)


@register
class EmbeddingAdapters(MatrixKind):
    """The adapters of an nn.Embedding. One whose table is tied to a head is adapted alone: the head reads W0."""

    layer = LoraEmbedding
    role = "embedding"
    keys: ClassVar[dict[str, str]] = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
    zero = "A"
    halved = False  # A is looked up, and sums nothing

    @classmethod
    def check(cls, model: nn.Module, name: str, module: nn.Module) -> None:
        super().check(model, name, module)
        if module.max_norm is not None:
            raise LoraError(
                f"targets: {name!r} has max_norm={module.max_norm}, which rewrites the frozen table in each forward "
                "pass; set it to None, or leave it out"
            )

    def check_size(self, name: str) -> None:
        """A lookup past the end of A would stop a GPU, and one in a longer A would go unseen."""
        rows = self.frozen.parameter.shape[0]
        for made in {A.shape[1] for term in self.terms for A, _, _ in term.pairs()} - {rows}:
            raise LoraError(
                f"model: {name}: the table has {rows} rows now and the adapter was made for {made}; resize the table "
                "before lora.inject or lora.load, or lora.remove the adapter first"
            )

    def check_merge(self, name: str, host: nn.Module, into: str | None) -> None:
        super().check_merge(name, host, into)
        self.check_size(repr(name))

    def runs(self, host: nn.Module, plain: torch.dtype | None) -> str:
        return "lookup"
