"""What a LLaMA-Adapter makes of features from elsewhere: pictures, sounds, anything that another model has encoded.

    "late"   one vector for each row, which is added to the prompts of every layer   (arXiv:2303.16199, 3.4)
    "early"  tokens in the place of prompts, for the layers below those with prompts  (arXiv:2304.15010, 3.3)

Features are (batch, tokens, dim): places of a picture, or one token for each scale.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import LoraError

WIDEST, DEPTH, HEAD = 768, 2, 64  # of the transformer; the first as published


class Encoder(nn.Module):
    """Features (batch, tokens, dim) to what a layer attends to; fp32 masters. Subclasses give `forward`."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens, self.dim = tokens, dim

    def reset_(self) -> None:
        """Draw the parameters as torch's modules do."""
        for module in self.modules():
            if module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()


class Projection(Encoder):
    """All tokens of a row, concatenated, to one vector: (batch, 1, hidden)."""

    def __init__(self, tokens: int, dim: int, hidden: int) -> None:
        super().__init__(tokens, dim)
        self.projection = nn.Linear(tokens * dim, hidden)

    def forward(self, features: Tensor) -> Tensor:
        made: Tensor = self.projection(features.flatten(1))[:, None]
        return made


class Block(nn.Module):
    """A layer of the transformer, norms first: attention of all to all, and two linears."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(attended)
        made: Tensor = x + self.down(functional.gelu(self.up(self.between(x))))
        return made


class VisualTransformer(Encoder):
    """Learned queries beside the tokens of a row, through a few blocks: (batch, queries, hidden), normed."""

    def __init__(self, tokens: int, dim: int, hidden: int, queries: int) -> None:
        super().__init__(tokens, dim)
        width = min(hidden, WIDEST)
        width = width // HEAD * HEAD or width
        self.queries = nn.Parameter(torch.empty(1, queries, width))
        self.places = nn.Parameter(torch.empty(1, tokens, width))  # which token is which
        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(DEPTH))
        self.last, self.norm = nn.Linear(width, hidden), nn.LayerNorm(hidden)

    def reset_(self) -> None:
        super().reset_()
        with torch.no_grad():
            self.queries.normal_()
            self.places.normal_(std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        x = self.first(features) + self.places
        x = torch.cat([self.queries.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        made: Tensor = self.norm(self.last(x[:, : self.queries.shape[1]]))
        return made


def encoder(fusion: str, features: list[int], hidden: int, queries: int, device: torch.device) -> Encoder:
    """A new encoder for features (tokens, dim), its values not yet drawn."""
    with torch.device("meta"):  # where torch's modules draw nothing
        tokens, dim = features
        made: Encoder = Projection(tokens, dim, hidden)
        if fusion == "early":
            made = VisualTransformer(tokens, dim, hidden, queries)
    return made.to_empty(device=device)


class Condition:
    """The features of one batch, as long as a `condition` block lasts, and the encoder that reads them.

    The encoder runs in each layer that asks, so that it also has its gradient where layers are checkpointed.
    """

    def __init__(self, encoder: Encoder, features: Tensor) -> None:
        self.encoder, self.features = encoder, features
        self.times = 1  # how often generation repeats a row, as last seen

    def tokens(self, batch: int) -> Tensor:
        """What the encoder makes of the features, for a batch whose rows generation may have repeated.

        Raises:
            LoraError: the batch has other rows than the features.
        """
        rows = len(self.features)
        if not torch.compiler.is_compiling():
            self.times = repeats()
        if batch != rows * self.times and not (torch.compiler.is_compiling() and batch == rows):
            raise LoraError(
                f"features: they have {rows} rows, and the batch has {batch}; give one row of features for each "
                "row of the batch (generation repeats them itself, for its beams and num_return_sequences)"
            )
        own = next(self.encoder.parameters())
        made: Tensor = self.encoder(self.features.to(own.device, own.dtype))
        return made if batch == rows else made.repeat_interleave(batch // rows, 0)


def repeats() -> int:
    """How often the generation that is running, if one is, has repeated each row of its input."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        library = frame.f_globals.get("__name__", "").startswith("transformers.")
        if library and frame.f_code.co_name == "generate" and "generation_config" in frame.f_locals:
            settings: Any = frame.f_locals["generation_config"]
            counts = [getattr(settings, name, 1) or 1 for name in ("num_beams", "num_return_sequences")]
            return int(max(counts))
        frame = frame.f_back
    return 1
