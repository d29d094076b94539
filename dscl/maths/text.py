"""Scores of one answer, from 0 to 1: accuracy of a label, exact match and ROUGE-L of free text.

Each takes the prediction and the references that count as right, of which the best one decides. The score of a task is
the mean over its records.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_WORD = re.compile(r"[^\W_]+")


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the chosen label is a right one. Outer white space does not count; case does, as labels may differ in it."""
    return _best(prediction, references, lambda p, r: float(p.strip() == r.strip()))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the texts are equal in lower case, without outer white space, each inner run of it taken as one space."""
    return _best(prediction, references, lambda p, r: float(_plain(p) == _plain(r)))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L (Lin, 2004): the F-measure of the longest common subsequence of words.

    A word is a run of letters and digits of any script, in lower case. A text without a word has nothing in common
    with any other.
    """
    return _best(prediction, references, lambda p, r: _f_measure(words(p), words(r)))


def words(text: str) -> list[str]:
    """The lower-cased runs of letters and digits in `text`."""
    return _WORD.findall(text.lower())


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    Bit-parallel (Hyyrö, 2004): the bits of one integer are a whole row of the usual table, a 0 at each position of `a`
    where the row grows, so that a word of `b` costs a few operations on integers.
    """
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        hits = row & where.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(a) - row.bit_count()


def _f_measure(prediction: Sequence[str], reference: Sequence[str]) -> float:
    # 2PR / (P + R) with P = common / len(prediction) and R = common / len(reference)
    total = len(prediction) + len(reference)
    return 2 * common_length(prediction, reference) / total if total else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _best(prediction: str, references: Sequence[str], score: Callable[[str, str], float]) -> float:
    if not references:
        raise ValueError("no reference is given; at least one is needed")
    return max(score(prediction, reference) for reference in references)
