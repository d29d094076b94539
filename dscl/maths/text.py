"""Scores of one answer, from 0 to 1: of a label, of free text, of code and of a simplified text.

Each takes the prediction and the references that count as right, of which the best one decides; `sari` alone weighs all
references together, and takes the text that was to be simplified as well. The score of a task is the mean over its
records.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

_WORD = re.compile(r"[^\W_]+")
# How Py150 writes a literal: its kind, and what it says where it is a common one.
_LITERAL = re.compile(r"<(NUM|STR|CHAR)_LIT(?::(.*?))?>", re.DOTALL)
# A word, or a mark that is a token by itself: any of ASCII but ' and - within a word, . and , within a number.
_TOKEN = re.compile(
    r"""  [!-&(-+/:-@\[-`{-~]
        | (?<![0-9])[.,] | [.,](?![0-9]) | (?<=[0-9])-
        | (?: [^\s!-&(-/:-@\[-`{-~] | (?<=[0-9])[.,](?=[0-9]) | (?<![0-9])- )+""",
    re.VERBOSE,
)


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the chosen label is a right one. Outer white space does not count; case does, as labels may differ in it."""
    return _best(prediction, references, lambda p, r: float(p.strip() == r.strip()))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the texts are equal in lower case, without outer white space, each inner run of it taken as one space."""
    return _best(prediction, references, lambda p, r: float(_plain(p) == _plain(r)))


def first_letter(prediction: str, references: Sequence[str]) -> float:
    """1 if the texts begin with the same character, as the letter of a choice before its reasons; case counts."""
    return _best(prediction, references, lambda p, r: float(p.strip()[:1] == r.strip()[:1] != ""))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L (Lin, 2004): the F-measure of the longest common subsequence of words.

    A word is a run of letters and digits of any script, in lower case. A text without a word has nothing in common
    with any other.
    """
    return _best(prediction, references, lambda p, r: _f_measure(words(p), words(r)))


def edit_similarity(prediction: str, references: Sequence[str]) -> float:
    """1 - (characters to insert and delete) / (characters of both), without outer white space.

    That is 2 common / (characters of both), with the longest common subsequence: `fuzz.ratio` of rapidfuzz, and of
    fuzzywuzzy on python-Levenshtein, unrounded. An empty text has nothing in common with any other.
    """
    return _best(prediction, references, lambda p, r: _f_measure(p.strip(), r.strip()))


def code_similarity(prediction: str, references: Sequence[str]) -> float:
    """Edit similarity of code as Py150 writes it, each literal replaced by what it says: a number that is not told
    by 0, a string that is not told by nothing."""
    return edit_similarity(_plain_code(prediction), [_plain_code(reference) for reference in references])


def sari(prediction: str, references: Sequence[str], source: str) -> float:
    """SARI (Xu et al., 2016): what a simplification of `source` keeps, deletes and adds, against the references.

    For runs of 1, 2, 3 and 4 tokens: the F-measure of the kept, the precision of the deleted and the F-measure of the
    added ones; then the mean of the twelve. As Hugging Face's `sari` has it: 0 / 0 is 1, recall of the kept ones counts
    occurrences, and tokens are those of BLEU's 13a in lower case.
    """
    _refuse_none(references)
    before, after, *wanted = (_TOKEN.findall(text.lower()) for text in (source, prediction, *references))
    return sum(_sari_of_runs(n, before, after, wanted) for n in (1, 2, 3, 4)) / 4


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


def _sari_of_runs(n: int, source: Sequence[str], answer: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    # Counted once for each reference, so that a run which half of the references keep is half right to keep.
    before, after = (
        Counter({run: count * len(references) for run, count in _runs(tokens, n).items()})
        for tokens in (source, answer)
    )
    wanted = sum((_runs(reference, n) for reference in references), Counter[tuple[str, ...]]())

    kept, right = before & after, before & after & wanted
    precision = _share(sum(right[run] / kept[run] for run in kept), len(kept))
    keep = _harmonic(precision, _share(right.total(), (before & wanted).total()))

    deleted = before - after
    right = deleted - wanted
    delete = _share(sum(right[run] / deleted[run] for run in deleted), len(deleted))

    added, to_add = after.keys() - before.keys(), wanted.keys() - before.keys()
    hits = len(added & to_add)
    add = _harmonic(_share(hits, len(added)), _share(hits, len(to_add)))
    return (keep + delete + add) / 3


def _runs(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def _harmonic(precision: float, recall: float) -> float:
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _plain_code(code: str) -> str:
    return _LITERAL.sub(lambda literal: literal[2] or ("0" if literal[0] == "<NUM_LIT>" else ""), code)


def _f_measure(prediction: Sequence[str], reference: Sequence[str]) -> float:
    # 2PR / (P + R) with P = common / len(prediction) and R = common / len(reference)
    total = len(prediction) + len(reference)
    return 2 * common_length(prediction, reference) / total if total else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _best(prediction: str, references: Sequence[str], score: Callable[[str, str], float]) -> float:
    _refuse_none(references)
    return max(score(prediction, reference) for reference in references)


def _refuse_none(references: Sequence[str]) -> None:
    if not references:
        raise ValueError("no reference is given; at least one is needed")
