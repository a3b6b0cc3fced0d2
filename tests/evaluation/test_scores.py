"""Each score against values found by hand, and against the definition written the long way."""

import math
import random

import pytest

from lora.evaluation.scores import (
    bleu,
    common_length,
    exact,
    first_label,
    label_scores,
    most_frequent,
    perplexity,
    rouge_l,
)


def longest(left: list[str], right: list[str]) -> int:
    """The table of the textbook."""
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_longest_common_subsequence_is_exact() -> None:
    draw = random.Random(0)
    for _ in range(300):
        left, right = ([draw.choice("abcd") for _ in range(draw.randrange(90))] for _ in range(2))
        assert common_length(left, right) == longest(left, right)


def test_rouge_l_by_hand() -> None:
    # "police kill the gunman" and "police killed the gunman" (Lin, 2004): 3 of 4 words, P = R = 0.75.
    assert rouge_l(["police kill the gunman"], [["Police killed the gunman."]]) == pytest.approx(75.0)
    # P = 2/2, R = 2/4, F1 = 2/3; the nearer of two references counts; the mean over two answers.
    assert rouge_l(["the gunman", "x"], [["police killed the gunman", "nothing"], ["y"]]) == pytest.approx(100 / 3)
    assert rouge_l([""], [[""]]) == 0.0
    assert rouge_l(["ÜBER straße"], [["über Straße"]]) == pytest.approx(100.0)  # letters of any script


def test_bleu_takes_several_references() -> None:
    answers = ["the cat sat on the mat", "a dog barked at the moon"]
    assert bleu(answers, [["the cat sat on the mat"], ["a dog barked at the moon"]]) == pytest.approx(100.0)
    alone = bleu(answers, [["a cat is on the mat"], ["a dog barked at the moon"]])
    both = bleu(answers, [["a cat is on the mat", "the cat sat on the mat"], ["a dog barked at the moon"]])
    assert alone < both == pytest.approx(100.0)


def test_exact_and_perplexity() -> None:
    assert exact([" yes\n", "no"], [["maybe", "yes"], ["yes"]]) == 50.0
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e6) == math.inf


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Positive", "positive"),
        ("I would say neutral, not negative", "neutral"),
        ("moderately negative", "moderately negative"),  # not the "negative" inside it
        ("mildly", ""),
        ("", ""),
    ],
)
def test_the_first_label_in_an_answer(answer: str, label: str) -> None:
    assert first_label(answer, ["positive", "negative", "Neutral", "moderately negative"]) == label


def test_of_labels_at_one_place_the_longest_is_found() -> None:
    assert first_label("15092.44", ["1", "15092", "15092.44", "5"]) == "15092.44"


def test_accuracy_and_weighted_f1_by_hand() -> None:
    targets = ["a", "a", "a", "B"]
    scores = label_scores(["a", "a", "b", ""], targets)
    # a: P = 2/2, R = 2/3, F1 = 0.8, three rows; b: P = 0/1, so 0, one row.
    assert scores == {"accuracy": 50.0, "f1": pytest.approx(60.0), "no_label": 25.0}
    # a alone: P = 3/4, R = 1, F1 = 6/7, weighted by 3 of 4 rows.
    assert most_frequent(targets) == {"accuracy": 75.0, "f1": pytest.approx(100 * 18 / 28), "no_label": 0.0}
