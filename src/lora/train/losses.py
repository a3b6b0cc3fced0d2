"""The loss as a mean over trained tokens: of a whole optimizer step, and of all held-out rows."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data.encode import IGNORED
from ..errors import LoraError, LoraWarning
from .modes import evaluating


def token_weighted(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The cross-entropy of a micro-batch's trained tokens, summed, over the number of them in its whole step.

    The sum over a step's micro-batches is then the mean over its tokens, however it was split. It is Trainer's
    `compute_loss_func`: with it no model's own loss is asked, and so none that takes no `num_items_in_batch`, or takes
    and ignores it, counts a short micro-batch for as much as a long one.

    Args:
        outputs: a model's, with `logits` (rows, length, vocabulary); computed without labels.
        labels: (rows, length), -100 where not trained; each token predicts the next.
        num_items_in_batch: trained tokens of the whole step; None counts this batch's.
    """
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    # Labels move, not logits: what is cut from the logits would be copied.
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)
    total = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    count = trained_tokens(labels) if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return total / count.to(total.device).clamp(min=1)  # a step without a trained token has no loss, and is no NaN


def loss_of(model: Any) -> Callable[..., Tensor]:
    """What a step's micro-batches add up: `token_weighted`, and the routers' own loss where the config asks for it.

    With `output_router_logits` a mixture of experts has an auxiliary loss, which holds uneven use against it. It is of
    a batch and no mean over tokens. So a step has the mean of its micro-batches', weighted by their trained tokens,
    and unlike the rest it depends a little on how the step is cut. Held-out losses are without it.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return token_weighted
    factor = _first(model, config, "router_aux_loss_coef", "aux_loss_coef")

    def with_routers(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        loss, routers = token_weighted(outputs, labels, num_items_in_batch), getattr(outputs, "aux_loss", None)
        if not isinstance(routers, Tensor) or factor is None:
            lacks = "router_aux_loss_coef" if factor is None else "aux_loss"
            warnings.warn(
                f"output_router_logits is on, but {type(model).__name__} has no {lacks}: the routers' loss is left out",
                LoraWarning, stacklevel=2,
            )  # fmt: skip
            return loss
        share = 1.0 if num_items_in_batch is None else trained_tokens(labels) / num_items_in_batch
        return loss + factor * share * routers.to(loss.device)

    return with_routers


def _first(model: Any, config: Any, *names: str) -> float | None:
    """The first of these numbers that the model has, or its config."""
    found = [getattr(each, name, None) for name in names for each in (model, config)]
    return next((float(number) for number in found if isinstance(number, (int, float))), None)


def trained_tokens(labels: Tensor) -> Tensor:
    """How many labels (rows, length) are trained: all but -100 and each row's first, which nothing predicts."""
    return (labels[:, 1:] != IGNORED).sum()


@torch.no_grad()
def held_out_loss(model: Any, batches: Iterable[Mapping[str, Any]]) -> float:
    """The mean loss of all trained tokens in the batches: not the mean of means, which counts a short batch double.

    The model is in eval mode meanwhile, so no generator moves: a run is the same however often it is measured.

    Args:
        batches: from a collator, with `labels`; moved to the model's device here.

    Raises:
        LoraError: no batch.
    """
    device = next(model.parameters()).device
    losses, counts = [], []
    with evaluating(model):
        for batch in batches:
            inputs = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}
            labels = inputs.pop("labels")
            losses.append(token_weighted(model(**inputs), labels, 1))
            counts.append(trained_tokens(labels))
    if not losses:
        raise LoraError("batches: there is none; give held-out rows")
    total, count = torch.stack(losses).cpu().double().sum(), torch.stack(counts).sum()  # one wait for the device
    return float(total / count)
