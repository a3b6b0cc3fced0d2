"""Whether packed rows stay apart in a model: tried on the model itself, since no model says so."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..data.collate import PackingCollator
from ..data.encode import Encoded
from ..errors import LoraError
from .modes import evaluating
from .quiet import quiet

# Tokens of the rows of two packs, of which the second is padded.
_LENGTHS = ((11, 7, 1, 9), (6,))
# How far packed logits may be from the row's own, root mean square over their spread, since sums run in another order:
# 2e-6 in fp32 and up to 0.03 in bf16 are usual, and positions that run on through a pack make 0.7 and more.
_NEAR, _NEAR_IN_FEW_BITS = 1e-3, 0.25


def collator_for(model: Any, pad_id: int) -> PackingCollator:
    """The packing that the model's attention takes: one flat row for flash attention, a row for each pack elsewhere."""
    return PackingCollator(pad_id, flat="flash" in str(getattr(model.config, "_attn_implementation", "")))


@quiet()
def check_packing(model: Any) -> None:
    """Tries a batch of packs on the model, which is left as it was.

    For each row, the gradient of its logits by the input embeddings of every other token must be zero to the bit, and
    the logits those that it has alone. The first alone would miss positions that run on through a pack, the second a
    leak that is small in this model as it is.

    Raises:
        LoraError: the model does not take packs, or does not keep their rows apart; the message says what it did.
    """
    with evaluating(model), torch.enable_grad():
        fault = _fault(model)
    if fault is not None:
        attention = getattr(model.config, "_attn_implementation", None)
        raise LoraError(
            f"packing: {type(model).__name__} with {attention} attention cannot train on packed rows: {fault}. "
            "Give packing: false (group_by_length saves most of the padding)"
        )


def _fault(model: Any) -> str | None:
    """What packing does to the model, or None."""
    packs = _packs(model)
    collator = collator_for(model, 0)
    batch = collator(packs)
    whole = {parameter.dtype for parameter in model.parameters()} <= {torch.float32, torch.float64}
    near = _NEAR if whole else _NEAR_IN_FEW_BITS
    for number, (pack, start, row) in enumerate(_starts(packs, collator.flat)):
        own = slice(start, start + len(row["input_ids"]))
        try:
            with _embedded(model) as embeddings:
                logits = _logits(model, batch)[pack, own]
        except (TypeError, ValueError) as error:  # an argument that it does not take, or not so
            return f"it does not take the batch ({type(error).__name__}: {error})"
        if not embeddings:
            return "its input embeddings are not where it says, so that nobody can tell"
        inside, outside = _gradient(logits, embeddings[0], pack, own)
        if not inside > 0:
            return f"row {number + 1} of a trial has no finite gradient, so that nobody can tell"
        if outside:
            return f"in a trial the logits of row {number + 1} depend on tokens of other rows"
        alone = _logits(model, {"input_ids": torch.tensor([row["input_ids"]]), "use_cache": False})[0].detach()
        apart = float((logits.detach() - alone).float().square().mean().sqrt() / alone.float().std())
        if not apart <= near:
            return (
                f"in a trial the logits of row {number + 1} are {apart:.1%} from those of the row alone (its positions "
                "do not start again at the row)"
            )
    return None


def _packs(model: Any) -> list[list[Encoded]]:
    """Rows of ordinary tokens: not the first few of the vocabulary nor its end, where the special ones are."""
    words = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)

    def row(length: int) -> Encoded:
        ids = torch.randint(words // 4, max(words // 2, words // 4 + 1), (length,), generator=generator).tolist()
        return Encoded(input_ids=ids, labels=list(ids))

    return [[row(length) for length in pack] for pack in _LENGTHS]


def _starts(packs: list[list[Encoded]], flat: bool) -> Iterator[tuple[int, int, Encoded]]:
    """Of each row: its row in the batch, and where in that it starts."""
    start = 0
    for number, pack in enumerate(packs):
        start = start if flat else 0
        for row in pack:
            yield (0 if flat else number), start, row
            start += len(row["input_ids"])


@contextmanager
def _embedded(model: Any) -> Iterator[list[Tensor]]:
    """Collects the input embeddings of a forward pass, as leaves that take gradients."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()  # a leaf cannot be written in place, which some models do

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def _logits(model: Any, batch: dict[str, Any]) -> Tensor:
    device = model.get_input_embeddings().weight.device
    inputs = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in batch.items() if k != "labels"}
    output: Tensor = model(**inputs, return_dict=True).logits
    return output


def _gradient(logits: Tensor, embeddings: Tensor, pack: int, own: slice) -> tuple[float, float]:
    """The largest gradient of the row's logits by the embeddings of its own tokens, and of all others."""
    # Weights of either sign, so that no part of the logits cancels another, as a loss's do (they sum to zero).
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), embeddings)
    inside = float(gradient[pack, own].abs().max())
    gradient[pack, own] = 0
    return inside, float(gradient.abs().max())
