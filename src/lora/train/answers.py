"""What a model answers to rows, token by token as it was trained on them, and whether it stops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.collate import padded
from ..data.encode import IGNORED, Encoded
from ..data.template import PromptTemplate
from .base import max_positions
from .generation import generation_settings
from .modes import evaluating
from .quiet import quiet


@dataclass(frozen=True)
class Question:
    """A row's last answer, and what stands before it; both as the row has them, in tokens.

    A plain text has no answer. Its first half is the prompt then, and `is_text` is set.
    """

    prompt: list[int]
    reference: list[int]
    is_text: bool


@dataclass(frozen=True)
class Answer:
    """What was generated, without the stop token; `stopped` says that there was one."""

    ids: list[int]
    stopped: bool


def question(row: Encoded) -> Question:
    """The question that a row asks."""
    ids, trained = row["input_ids"], [label != IGNORED for label in row["labels"]]
    end = len(ids)
    while end and not trained[end - 1]:
        end -= 1
    start = end
    while start and trained[start - 1]:
        start -= 1
    if start == 0:  # all of it is trained
        half = max(1, len(ids) // 2)
        return Question(ids[:half], ids[half:], True)
    return Question(ids[:start], ids[start:end], False)


def room(asked: Question, model: Any) -> int | None:
    """How many tokens may follow a prompt; None: as many as you like."""
    most = max_positions(model.config)
    return None if most is None else most - len(asked.prompt)


@quiet()
@torch.no_grad()
def answers(
    model: Any, template: PromptTemplate, asked: Sequence[Question], longest: int, batch_size: int
) -> list[Answer]:
    """The likeliest answer to each question, of at most `longest` tokens or what the model has room for.

    The model is in its own modes again afterwards, and no random number is drawn.
    """
    found: dict[int, Answer] = {}
    order = sorted(range(len(asked)), key=lambda place: len(asked[place].prompt))  # less padding
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            left = room(asked[batch[-1]], model)  # the longest prompt is the batch's last
            most = longest if left is None else min(longest, left)
            if most < 1:
                found |= dict.fromkeys(batch, Answer([], False))
                continue
            settings = generation_settings(template, model, most, 0.0)
            new = _continued(model, [asked[place].prompt for place in batch], settings)
            found |= zip(batch, (_cut(ids, set(settings.eos_token_id)) for ids in new), strict=True)
    return [found[place] for place in range(len(asked))]


def _continued(model: Any, prompts: Sequence[list[int]], settings: Any) -> list[list[int]]:
    ids = padded(prompts, settings.pad_token_id, left=True).to(model.device)
    mask = padded([[1] * len(row) for row in prompts], 0, left=True).to(model.device)
    output: Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    new: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return new


def _cut(ids: list[int], stops: set[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return Answer(ids[:end], end is not None)
