"""Scores of answers, by the library that defines each where there is one.

BLEU is sacrebleu's and accuracy and F1 are scikit-learn's. ROUGE-L is here: the two have none, and its exact definition
is a dozen lines. All but perplexity are per cent.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..errors import DataError
from ..train.classify import accuracy_f1

NO_LABEL = ""  # what is found in an answer that names no label
_WORD = re.compile(r"[^\W_]+")


def perplexity(loss: float) -> float:
    """exp of the mean loss of a token; infinite where that passes what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """sacrebleu's BLEU of the whole set, with its own tokens and case kept; each answer has one reference or more."""
    import sacrebleu

    # It wants one list for each position of a reference; an answer with fewer has None there.
    most = max(map(len, references))
    columns: Any = [[given[i] if i < len(given) else None for given in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(answers), columns).score)


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean over answers of ROUGE-L's F1 (Lin, 2004) with the reference that it is nearest to.

    The longest common subsequence of words: runs of letters and digits, in lower case.
    """
    best = [
        max(_rouge_l(_words(answer), _words(each)) for each in given)
        for answer, given in zip(answers, references, strict=True)
    ]
    return 100 * sum(best) / len(best)


def _rouge_l(answer: list[str], reference: list[str]) -> float:
    # 2 P R / (P + R) with P and R the length over each side's own.
    return 2 * common_length(answer, reference) / max(1, len(answer) + len(reference))


def common_length(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest common subsequence; each row of the table is the bits of one integer.

    Bit i of `row` is 0 where the length grows at left[i] (Hyyrö, 2004).
    """
    at: dict[str, int] = {}
    for i, word in enumerate(left):
        at[word] = at.get(word, 0) | 1 << i
    full = row = (1 << len(left)) - 1
    for word in right:
        hits = row & at.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(left) - row.bit_count()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def exact(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of answers that are one of their references, but for white space at the ends."""
    right = [a.strip() in {each.strip() for each in given} for a, given in zip(answers, references, strict=True)]
    return 100 * sum(right) / len(right)


def first_label(answer: str, labels: Sequence[str]) -> str:
    """The label that comes first in an answer, in lower case, as FinLoRA scores it; `NO_LABEL` where none comes.

    Of labels that start at one place ("strong", "strong negative") it is the longest.
    """
    text = answer.lower()
    found = [(place, -len(label), label) for label in map(str.lower, labels) if (place := text.find(label)) >= 0]
    return min(found)[2] if found else NO_LABEL


def split_joined(answer: str, count: int) -> list[str]:
    """The parts of an answer between its commas: `count` of them, those that are missing empty, as FinLoRA cuts it."""
    parts = [part.strip().replace("\n", "") for part in answer.split(",")]
    return parts[:count] + [""] * (count - len(parts))


def label_scores(found: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Accuracy, F1 weighted by how many rows have each label, and the share of answers without any label."""
    right = [target.lower() for target in targets]
    return {**accuracy_f1(list(found), right), "no_label": 100 * sum(label == NO_LABEL for label in found) / len(found)}


def most_frequent(targets: Sequence[str]) -> dict[str, float]:
    """The scores of the one label that most rows have: what knowing nothing of a row gives."""
    if not targets:
        raise DataError("there are no rows to score")
    right = [target.lower() for target in targets]
    return label_scores([Counter(right).most_common(1)[0][0]] * len(right), right)
