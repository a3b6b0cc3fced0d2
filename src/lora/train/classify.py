"""A classifier's run: rows of a text and its label, a model with a head for them, and how often it is right.

The head is fresh, so it trains whole and is saved with the adapter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import LoraConfig, PromptConfig, matches
from ..data.collate import padded
from ..data.encode import Encoded, EncodedData
from ..data.labels import labelled_format, labelled_texts
from ..data.sound import Row, named_rows, place, shown
from ..errors import DataError, LoraError
from ..layers.left_out import fresh_modules
from .base import load_base, load_config, max_positions, task_head

_MANY = 100  # from so many labels on, they may be at most half as many as the rows


@dataclass
class LabelledData(EncodedData):
    """Rows whose `labels` is one number: the label's place in `names`. `cut` counts texts cut at `max_length`."""

    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.rows):,} rows ({self.format}), {self.tokens:,} tokens, labels: {', '.join(self.names)}"]
        if self.cut:
            lines.append(f"{self.cut:,} texts are longer than max_length={self.max_length} and were cut there")
        return "\n".join(lines)


@dataclass
class LabelCollator:
    """Rows (length,) into a batch (rows, longest), padded on the right; labels (rows,)."""

    pad_id: int

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": padded(ids, self.pad_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": torch.tensor([row["labels"][0] for row in rows]),
        }


def label_names(rows: Sequence[Row], model: str, argument: str = "data") -> list[str]:
    """The labels by number: the stored model's own where it has a head for them, else the rows', sorted.

    Raises:
        DataError: a row without a text or a label, fewer than two labels, or nearly one for each row.
        LoraError: the model has a head for other labels.
    """
    found = {label for _, label in labelled_texts(rows, argument)}
    names = sorted(found, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
    if len(names) < 2:
        raise DataError(f"{argument}: all rows have the label {names[0]!r}; a classifier needs two labels or more")
    if len(names) > max(_MANY, len(rows) // 2):
        raise DataError(
            f"{argument}: {len(rows):,} rows have {len(names):,} different labels, such as {shown(names[0])}; give one "
            "of a few labels to each row"
        )
    stored = stored_labels(model)
    if not stored or (len(stored) == len(names) and all(n.startswith("LABEL_") for n in stored)):
        return names
    if not found <= set(stored):
        raise LoraError(
            f"model: {model!r} has a head for the labels {', '.join(stored)}, and the rows have {', '.join(names)}; "
            "give rows with its labels, or a model without a head"
        )
    return stored


def stored_labels(model: str) -> list[str]:
    """The labels of a model that is stored as a classifier; none of any other."""
    config = load_config(model)
    if not any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ()):
        return []
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def encode_labelled(
    rows: Sequence[Row], tokenizer: Any, max_length: int, names: Sequence[str], argument: str = "data"
) -> LabelledData:
    """Rows `{"text" or "sentence", "label"}` into tokens and a label's number. A text that is too long is cut.

    Raises:
        DataError: a row without a text or a label, or with a label that is not in `names`; the message names the rows.
    """
    pairs = labelled_texts(rows, argument)
    unknown = [
        place(row, i) for i, (row, (_, label)) in enumerate(zip(rows, pairs, strict=True), 1) if label not in names
    ]
    if unknown:
        raise DataError(
            f"{argument}: {named_rows(unknown)}: its label is none of {', '.join(names)}, which are the data's"
        )
    encoded: list[Encoded] = []
    longest = cut = 0
    for text, label in pairs:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        longest = max(longest, len(ids))
        if len(ids) > max_length:
            cut += 1
            ids = list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])  # keeps its closing token
        encoded.append(Encoded(input_ids=ids, labels=[names.index(label)]))
    return LabelledData(
        encoded, labelled_format(rows[0]), max_length, len(rows), longest=longest, cut=cut, names=tuple(names)
    )


def longest_text(model: str, tokenizer: Any) -> int | None:
    """How many tokens a classifier takes: some have fewer places than their table of positions has rows."""
    known = [max_positions(load_config(model)), tokenizer.model_max_length]
    return min((int(most) for most in known if most is not None and most < 1 << 20), default=None)


def load_classifier(
    name: str, names: Sequence[str], tokenizer: Any, dtype: torch.dtype | str, quantize: str = "none",
    device: str | None = None,
) -> Any:  # fmt: skip
    """A sequence classifier of these labels, as `load_base` loads: its head is fresh where none is stored.

    A fresh head is drawn from torch's generator: it repeats with a seed.
    """
    model = load_base(name, dtype, quantize, device, labels=names)
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:  # by it a decoder finds the last token of a row
        text_config.pad_token_id = pad_id(model, tokenizer)
    return model


def pad_id(model: Any, tokenizer: Any) -> int:
    """What pads a row: the model's own where it has one."""
    own = (tokenizer.pad_token_id, tokenizer.eos_token_id) if tokenizer is not None else ()
    known = (model.config.get_text_config().pad_token_id, *own, 0)
    return next(int(token) for token in known if token is not None)


def head_modules(model: Any) -> list[str]:
    """The modules that train whole: all beside the model's body that have parameters, and what has fresh values.

    The body is what transformers calls so; what it marks as fresh covers a pooler that the stored model lacks.
    """
    beside = task_head(model)
    fresh = [name for name in fresh_modules(model) if name.partition(".")[0] not in beside]
    return [*beside, *fresh]


def with_head(config: LoraConfig | PromptConfig, model: Any) -> LoraConfig | PromptConfig:
    """The config with the head's modules trained whole, beside those that it names itself."""
    missing = [name for name in head_modules(model) if not matches(config.train, name)]
    return replace(config, train=[*config.train, *missing])


@torch.inference_mode()
def class_logits(
    model: Any, rows: Sequence[Encoded], pad: int, batch_size: int = 32, on_batch: Callable[[int], None] | None = None
) -> Tensor:
    """(rows, labels), in fp32 on the CPU; the model is left as it was."""
    collate, device, was_training = LabelCollator(pad), next(model.parameters()).device, model.training
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # less padding
    parts = []
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = collate([rows[i] for i in order[start : start + batch_size]])
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            parts.append(model(**inputs).logits.float().cpu())
            if on_batch is not None:
                on_batch(len(parts[-1]))
    finally:
        model.train(was_training)
    logits = torch.cat(parts)
    return logits[torch.tensor(order).argsort()]


def accuracy_f1(found: Sequence[Any], right: Sequence[Any]) -> dict[str, float]:
    """Accuracy and F1 weighted by how many rows have each label, by scikit-learn, in per cent."""
    from sklearn.metrics import accuracy_score, f1_score  # type: ignore[import-untyped]

    return {
        "accuracy": 100 * float(accuracy_score(right, found)),
        "f1": 100 * float(f1_score(right, found, average="weighted", zero_division=0)),
    }
