"""Answer scores worked out by hand, and the longest common subsequence against the textbook table."""

from __future__ import annotations

import random
import time

import pytest

from dscl.maths.text import accuracy, common_length, exact_match, rouge_l, words


def test_accuracy_is_of_the_label_itself() -> None:
    assert accuracy(" Sports\n", ["World", "Sports"]) == 1.0
    assert accuracy("sports", ["Sports"]) == 0.0
    assert accuracy("Sports news", ["Sports"]) == 0.0


def test_exact_match_ignores_case_and_white_space_alone() -> None:
    assert exact_match("  The\tcat\n sat ", ["a dog", "the cat sat"]) == 1.0
    assert exact_match("the cat sat.", ["the cat sat"]) == 0.0
    assert exact_match("thecat sat", ["the cat sat"]) == 0.0
    assert exact_match("", ["  "]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("police killed the gunman", "police kill the gunman", 2 * (3 / 4) * (3 / 4) / (3 / 4 + 3 / 4)),
        ("the gunman kill police", "police kill the gunman", 2 / 4),  # order counts: "the gunman"
        ("a b c d e", "b d", 2 * (2 / 5) * 1 / (2 / 5 + 1)),
        ("The, CAT: sat!", "the cat sat", 1.0),
        ("ÉTÉ à Besançon", "été À besançon", 1.0),
        ("Привет, мир", "привет мир", 1.0),
        ("x_y", "x y", 1.0),
        ("42", "42.", 1.0),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_rouge_l_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert rouge_l(prediction, [reference]) == pytest.approx(expected)


def test_the_best_reference_decides() -> None:
    assert rouge_l("a b", ["c", "a b c d", "a x"]) == pytest.approx(2 * 2 / 6)
    for score in (accuracy, exact_match, rouge_l):
        assert score("yes", ["no", "yes", "maybe"]) == 1.0
        with pytest.raises(ValueError, match="no reference"):
            score("yes", [])


def test_words() -> None:
    assert words("It's 3.5 km—really_so") == ["it", "s", "3", "5", "km", "really", "so"]


def textbook(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_common_length_is_the_textbook_table() -> None:
    draw = random.Random(0)
    for _ in range(300):
        letters = "abcdefgh"[: draw.randint(1, 8)]
        a, b = ([draw.choice(letters) for _ in range(draw.randint(0, 90))] for _ in range(2))
        assert common_length(a, b) == textbook(a, b) == common_length(b, a)


def test_long_texts_are_quick() -> None:
    draw = random.Random(0)
    a, b = ([str(draw.randint(0, 50)) for _ in range(512)] for _ in range(2))
    start = time.perf_counter()
    for _ in range(100):
        common_length(a, b)
    assert time.perf_counter() - start < 2.0  # a table of 512² takes some 50 ms each
