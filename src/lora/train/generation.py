"""Answers from a model, batch by batch, prompted exactly as it was trained."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ..data.collate import padded
from ..data.formats import Example, detect, typed_prompt
from ..data.rows import Row
from ..data.sound import all_told
from ..data.template import PromptTemplate, stop_ids
from ..errors import LoraError
from .base import max_positions
from .quiet import quiet
from .streaming import Pieces


def row_prompts(rows: Sequence[Row], argument: str = "input") -> list[Example]:
    """The prompts of rows in any training format, with or without their answers (which are not used).

    Raises:
        LoraError: rows that fit no format, by number.
    """
    prompts: list[Example] = []
    faults: list[str] = []
    for number, row in enumerate(rows, 1):
        try:
            prompts.append(detect(row, answers=False).read(row, False))
        except LoraError as error:
            faults.append(f"row {number}: {error}")
    if faults:
        raise LoraError(f"{argument}: {all_told(faults, 'have no prompt')}")
    return prompts


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str | Example], *, max_new_tokens: int = 128, batch_size: int = 16,
    temperature: float = 0.0, seed: int = 0, style: str = "auto", on_batch: Callable[[int], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:  # fmt: skip
    """The answer to each prompt, in order, without the prompt and without special tokens.

    Prompts are rendered through the template that training uses; `model` is left as it was.

    Args:
        prompts: texts (one user turn each), or examples from `row_prompts`.
        temperature: 0 takes the likeliest token; above, samples with `seed`.
        style: how a prompt is written, the recipe's `template`; `style_as_trained` finds an adapter's.
        on_batch: called with the number of prompts done since the last call.
        on_text: called with a prompt's index and the next piece of its answer, as it grows. Prompts are then answered
            one at a time, in order.

    Raises:
        LoraError: a prompt that is empty, no text or leaves no room for an answer, or a value out of range.
    """
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise LoraError(f"{name} is {value}; it must be at least {least}")
    if not 0 <= temperature < float("inf"):
        raise LoraError(f"temperature is {temperature}; it must be 0 (greedy) or a positive number")
    template = PromptTemplate(tokenizer, style)
    encoded = [prompt_ids(number, prompt, template) for number, prompt in enumerate(prompts, 1)]
    _check_lengths(encoded, model, max_new_tokens)
    batches = _batches([len(ids) for ids in encoded], batch_size if on_text is None else 1, sort=on_text is None)
    answers = [""] * len(encoded)
    settings = generation_settings(template, model, max_new_tokens, temperature)
    torch.manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            emit = None if on_text is None else partial(on_text, batch[0])
            texts = _generate_batch(model, template, [encoded[index] for index in batch], settings, emit)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
            if on_batch is not None:
                on_batch(len(batch))
    finally:
        model.train(was_training)
    return answers


def _batches(lengths: Sequence[int], size: int, sort: bool) -> list[list[int]]:
    """Indices of prompts by batches; sorted, those of one length share a batch: less padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__) if sort else list(range(len(lengths)))
    return [order[start : start + size] for start in range(0, len(order), size)]


def prompt_ids(number: int, prompt: str | Example, template: PromptTemplate) -> list[int]:
    """Token ids of a prompt, `number` in errors. Raises `LoraError` for one that is empty or no text."""
    example = typed_prompt(prompt) if isinstance(prompt, str) else prompt
    texts = [message["content"] for message in example.messages] or [example.text]
    if not texts[-1].strip() and not (example.messages and example.messages[-1]["role"] == "tool"):
        raise LoraError(f"prompt {number} is empty; give at least one word")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LoraError(
                f"prompt {number} is no text: it holds {text[error.start]!a}, half of a character, after "
                f"{text[max(0, error.start - 20) : error.start]!r}; correct it"
            ) from error
    if not example.messages:
        return template.text_ids(example.text)
    return template.prompt_ids(template.prompt(example.messages, example.tools))


def _check_lengths(encoded: Sequence[Sequence[int]], model: Any, max_new_tokens: int) -> None:
    most = max_positions(model.config)
    for number, ids in enumerate(encoded, 1):
        if not ids:
            raise LoraError(f"prompt {number} is empty; give at least one token")
        if most is not None and len(ids) + max_new_tokens > most:
            raise LoraError(
                f"prompt {number} has {len(ids)} tokens, and max_new_tokens={max_new_tokens} more would pass the "
                f"{most} that the model takes; shorten the prompt or lower max_new_tokens"
            )


@quiet()  # it remarks on sampling settings that a greedy run does not use
def generation_settings(template: PromptTemplate, model: Any, max_new_tokens: int, temperature: float) -> Any:
    from transformers import GenerationConfig

    stops = stop_ids(template, model.generation_config)
    pad = template.tokenizer.pad_token_id
    # What is left unset here would be filled from the model's own generation_config (Qwen's has a repetition penalty),
    # and greedy would not mean the likeliest token.
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or 1.0, top_k=0, top_p=1.0,
        repetition_penalty=1.0, no_repeat_ngram_size=0, num_beams=1,
        eos_token_id=stops, pad_token_id=stops[0] if pad is None else pad,
    )  # fmt: skip


@quiet()
@torch.inference_mode()
def _generate_batch(
    model: Any, template: PromptTemplate, batch: Sequence[list[int]], settings: Any, emit: Callable[[str], None] | None
) -> list[str]:
    ids = padded(batch, settings.pad_token_id, left=True).to(model.device)
    mask = padded([[1] * len(row) for row in batch], 0, left=True).to(model.device)
    stops = set(settings.eos_token_id)
    pieces = None if emit is None else Pieces(template.tokenizer, stops, emit)
    output: Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, streamer=pieces)
    new = output[:, ids.shape[1] :].tolist()  # (rows, <= max_new_tokens)
    # Cut here and not by skip_special_tokens alone: a stop token need not be marked special in its tokenizer.
    answers = [list(takewhile(lambda token: token not in stops, row)) for row in new]
    return [str(template.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
