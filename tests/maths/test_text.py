"""Answer scores worked out by hand; the longest common subsequence against the textbook table, SARI against its
definition, gram by gram."""

from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest

from dscl.maths.text import (
    accuracy,
    code_similarity,
    common_length,
    edit_similarity,
    exact_match,
    first_letter,
    rouge_l,
    sari,
    split_words,
)


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
        ("A", "A\nBecause it is cold there.", 1.0),
        (" B\nBecause it is warm.", "B\nBecause of the sun.", 1.0),
        ("b", "B", 0.0),
        ("C. Because", "A\nBecause", 0.0),
        ("", "A\nBecause", 0.0),
        ("", "", 0.0),
    ],
)
def test_the_first_letter_is_the_choice(prediction: str, reference: str, expected: float) -> None:
    assert first_letter(prediction, [reference]) == expected


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


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("kitten", "sitting", 2 * 4 / 13),  # common: i t t n
        ("abcd", "bcda", 2 * 3 / 8),
        ("return x", "return x + 1", 2 * 8 / 20),
        ("  return x\n", "return x", 1.0),
        ("RETURN X", "return x", 2 * 1 / 16),  # the space
        ("", "return x", 0.0),
        ("", "", 0.0),
    ],
)
def test_edit_similarity_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert edit_similarity(prediction, [reference]) == pytest.approx(expected)
    assert edit_similarity(reference, [prediction]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("x = <NUM_LIT:12>", "x = 12", 1.0),
        ("x = <NUM_LIT>", "x = 0", 1.0),
        ("f ( '<STR_LIT>' )", "f ( '' )", 1.0),
        ("f ( '<STR_LIT:utf-8>' )", "f ( 'utf-8' )", 1.0),
        ("c = '<CHAR_LIT:>' + <NUM_LIT:1>", "c = '' + 1", 1.0),
        ("<STR_LIT:a\nb>", "a\nb", 1.0),
        ("if a < b and c > d :", "if a < b and c > d :", 1.0),
        ("x = <NUM_LIT:1>", "x = <NUM_LIT:2>", 2 * 4 / 10),  # "x = 1" and "x = 2"; as they stand it were 2 * 14 / 30
        ("<STR_LIT>", "<STR_LIT>", 0.0),  # nothing is left of either
    ],
)
def test_code_similarity_replaces_the_literals(prediction: str, reference: str, expected: float) -> None:
    assert code_similarity(prediction, [reference]) == pytest.approx(expected)


def test_the_best_reference_decides() -> None:
    assert rouge_l("a b", ["c", "a b c d", "a x"]) == pytest.approx(2 * 2 / 6)
    for score in (accuracy, exact_match, first_letter, rouge_l, edit_similarity, code_similarity):
        assert score("yes", ["no", "yes", "maybe"]) == 1.0
        with pytest.raises(ValueError, match="no reference"):
            score("yes", [])


def test_sari_by_hand() -> None:
    # "a b c" to "a b", where "a b d" is right; kept, deleted and added of each length:
    #   1: keeps a b of a b (1), deletes c rightly (1), adds none of d: precision 0/0 = 1, recall 0 (0)
    #   2: keeps "a b" (1), deletes "b c" rightly (1), adds none of "b d" (0)
    #   3: keeps nothing of nothing (1), deletes "a b c" rightly (1), adds none of "a b d" (0)
    #   4: there is nothing (1, 1, 1)
    assert sari("a b", ["a b d"], "a b c") == pytest.approx((2 / 3 + 2 / 3 + 2 / 3 + 1) / 4)
    # The same with a second reference "a c": each run of source and answer counts twice.
    #   1: a is right twice of 2, b once: precision 3/4; of a a b c to keep 3 are kept: recall 3/4 (3/4)
    #      c was deleted twice, once rightly (1/2); adds none of d (0)
    #   2: "a b" is kept twice, once rightly: precision 1/2, recall 1/1 (2/3); "b c" rightly deleted (1); none of "b d",
    #      "a c" added (0)
    #   3: (1), (1), (0) as before;  4: (1, 1, 1)
    expected = ((3 / 4 + 1 / 2) / 3 + (2 / 3 + 1) / 3 + 2 / 3 + 1) / 4
    assert sari("a b", ["a b d", "a c"], "a b c") == pytest.approx(expected)


def test_sari_of_the_example_that_its_implementations_share() -> None:
    source, answer = "About 95 species are currently accepted .", "About 95 you now get in ."
    references = [
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    ]
    assert sari(answer, references, source) == pytest.approx(0.26953601953601954)


def test_sari_at_the_edges() -> None:
    long = "one two three four five"
    assert sari(long, [long], long) == 1.0  # nothing was to be done
    assert sari("two three four five", ["two three four five"], long) == 1.0
    assert sari("", [""], "") == 1.0
    # An empty answer deletes everything, rightly what no reference keeps; what it should keep and add, it does not.
    assert sari("", [long], long) == pytest.approx((0 + 0 + 1) / 3)
    assert sari("", ["six seven eight nine"], long) == pytest.approx((1 + 1 + 0) / 3)
    assert sari("nine eight seven six", [""], long) == pytest.approx((1 + 1 + 0) / 3)
    with pytest.raises(ValueError, match="no reference"):
        sari("a", [], "a")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ('He said: "No!" (Twice.)', 'he said : " no ! " ( twice . )'),
        ("1,5 Mio., 3.2% - z.B. 1990-95", "1,5 mio . , 3.2 % - z . b . 1990 - 95"),
        ("it's well-known/known", "it's well-known / known"),
    ],
)
def test_sari_sees_marks_as_words(text: str, tokens: str) -> None:
    assert sari(text, [tokens], "") == 1.0  # else it would have added what no reference has


def sari_by_definition(answer: str, references: list[str], source: str) -> float:
    """Gram by gram, in exact fractions."""

    def share(part: Fraction, whole: Fraction) -> Fraction:
        return part / whole if whole else Fraction(1)

    def f1(p: Fraction, r: Fraction) -> Fraction:
        return 2 * p * r / (p + r) if p + r else Fraction(0)

    total = Fraction(0)
    for n in (1, 2, 3, 4):

        def grams(text: str, n: int = n) -> list[str]:
            words = text.split()
            return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

        s, a, r = grams(source), grams(answer), [gram for reference in references for gram in grams(reference)]
        m = len(references)
        correctly_kept = num_kept = common_with_reference = to_keep = correctly_deleted = num_deleted = Fraction(0)
        for gram in {*s, *a, *r}:
            in_s, in_a, in_r = m * s.count(gram), m * a.count(gram), r.count(gram)
            common = min(in_s, in_a)
            if common:
                num_kept += 1
                correctly_kept += Fraction(min(common, in_r), common)
            common_with_reference += min(common, in_r)
            to_keep += min(in_s, in_r)
            if in_s > in_a:
                num_deleted += 1
                correctly_deleted += Fraction(max(in_s - in_a - in_r, 0), in_s - in_a)
        added, to_add = set(a) - set(s), set(r) - set(s)
        hits = Fraction(len(added & to_add))
        total += f1(share(correctly_kept, num_kept), share(common_with_reference, to_keep))
        total += share(correctly_deleted, num_deleted)
        total += f1(share(hits, Fraction(len(added))), share(hits, Fraction(len(to_add))))
    return float(total / 12)


def test_sari_is_its_definition() -> None:
    draw = random.Random(0)
    for _ in range(300):
        letters = "abcdef"[: draw.randint(1, 6)]
        source, answer, *references = (
            " ".join(draw.choice(letters) for _ in range(draw.randint(0, 9))) for _ in range(2 + draw.randint(1, 3))
        )
        score = sari(answer, references, source)
        assert score == pytest.approx(sari_by_definition(answer, references, source), abs=1e-12)
        assert 0.0 <= score <= 1.0 + 1e-12


def test_words() -> None:
    assert split_words("It's 3.5 km—really_so") == ["it", "s", "3", "5", "km", "really", "so"]


def lcs_length_by_table(a: list[str], b: list[str]) -> int:
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
        assert common_length(a, b) == lcs_length_by_table(a, b) == common_length(b, a)


def test_long_texts_are_quick() -> None:
    draw = random.Random(0)
    a, b = ([str(draw.randint(0, 50)) for _ in range(512)] for _ in range(2))
    start = time.perf_counter()
    for _ in range(100):
        common_length(a, b)
    assert time.perf_counter() - start < 2.0  # a table of 512² takes some 50 ms each
