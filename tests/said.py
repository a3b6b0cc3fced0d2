"""What the library says while something runs."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lora import LoraWarning


@contextmanager
def said(*words: str) -> Iterator[list[str]]:
    """One LoraWarning for each of these words, in this order, and no other; gives their texts."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if issubclass(w.category, LoraWarning)]
    assert len(texts) == len(words), texts
    assert all(word in text for word, text in zip(words, texts, strict=True)), texts
