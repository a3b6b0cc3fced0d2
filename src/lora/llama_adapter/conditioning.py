"""condition: the features that a LLaMA-Adapter answers about, for as long as a block lasts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..atomic import alone, later_interrupts
from ..config import check_name
from ..errors import LoraError, near
from ..layers import feature_readers
from ..resident import acting, resident, unwrap
from ..updates import Condition


@contextmanager
def condition(model: nn.Module, features: Tensor, name: str | None = None) -> Iterator[nn.Module]:
    """Within the block the model sees these features, one row of them for each row of its batch.

    Training, evaluation and `generate` go on as ever inside it; generation repeats the features with its rows, for
    beams and `num_return_sequences`. Blocks of several adapters may stand within one another.

    Args:
        features: (batch, tokens, dim), floating: from any frozen encoder, of about unit variance. A gradient reaches
            who made them.
        name: the adapter that reads them; None is the one that acts and reads features.

    Raises:
        LoraError: no such adapter, or features of another shape; and from the forward pass where the batch has other
            rows.
    """
    root = unwrap(model)
    parts = feature_readers(root, _reader(root, name))
    encoder = parts[0].features
    assert encoder is not None
    given = Condition(encoder, _checked(features, (encoder.tokens, encoder.dim)))
    before = {part: part.condition for part in parts}

    def leave() -> None:
        with later_interrupts(), alone():
            for part, held in before.items():
                part.condition = held
            before.clear()

    try:
        try:
            with alone():
                for part in parts:
                    part.condition = given
            yield model
        finally:
            leave()
    except BaseException:
        leave()  # where an interrupt came before the first one was done
        raise


def _reader(root: nn.Module, name: str | None) -> str:
    """The name of the adapter that reads the features."""
    able = [each for each in resident(root) if feature_readers(root, each)]
    if name is not None:
        if check_name(name) not in able:
            raise LoraError(f"name: the model has no adapter {name!r} that reads features{near(name, able)}")
        return name
    found = [each for each in acting(root) if each in able]
    if len(found) != 1:
        how = "lora.llama_adapter.inject(model, ..., features=(tokens, dim)) makes one"
        if able:
            how = f"{', '.join(able)} would; lora.activate(model, ...) one of them, or give name="
        raise LoraError(f"model: {len(found) or 'no'} adapters that act read features; {how}")
    return found[0]


def _checked(features: Tensor, wanted: tuple[int, int]) -> Tensor:
    """The features, where they have the tokens and the dim that the encoder was made for."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise LoraError(f"features: got {kind}; a tensor of floats, (batch, tokens, dim)")
    if features.dim() != 3 or tuple(features.shape[1:]) != wanted:
        raise LoraError(
            f"features: got {tuple(features.shape)}; (batch, {wanted[0]}, {wanted[1]}), as the adapter was made for"
        )
    if not bool(features.isfinite().all()):
        raise LoraError("features: they have values that are NaN or infinite")
    # Who encoded under torch.inference_mode() may train on it all the same: autograd takes a copy, and not the tensor.
    return features if torch.is_inference_mode_enabled() or not features.is_inference() else features.clone()
