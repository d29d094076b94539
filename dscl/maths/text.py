"""Metrics of one answer, from 0 to 1: for labels, free text, code and simplified texts.

Each metric takes the prediction and the correct references, and returns the score against the best reference. Only
`sari` uses all references together; it also takes the source text that was to be simplified. The score of a task is the
mean over its samples.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

_WORD_PATTERN = re.compile(r"[^\W_]+")
# A literal as Py150 writes it: its kind, then its value if that is a common one.
_LITERAL_PATTERN = re.compile(r"<(NUM|STR|CHAR)_LIT(?::(.*?))?>", re.DOTALL)
# A token: a word, or a single ASCII punctuation mark except ' and - within a word, and . and , within a number.
_TOKEN_PATTERN = re.compile(
    r"""  [!-&(-+/:-@\[-`{-~]
        | (?<![0-9])[.,] | [.,](?![0-9]) | (?<=[0-9])-
        | (?: [^\s!-&(-/:-@\[-`{-~] | (?<=[0-9])[.,](?=[0-9]) | (?<![0-9])- )+""",
    re.VERBOSE,
)


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the predicted label equals a reference, apart from outer white space. Case counts."""
    return _best_score(prediction, references, lambda text, reference: float(text.strip() == reference.strip()))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the texts are equal in lower case, with outer white space removed and inner runs of it made one space."""
    return _best_score(prediction, references, lambda text, reference: float(_normalize(text) == _normalize(reference)))


def first_letter(prediction: str, references: Sequence[str]) -> float:
    """1 if the texts begin with the same character, such as the letter of a choice before its reasons; case counts."""
    return _best_score(
        prediction, references, lambda text, reference: float(text.strip()[:1] == reference.strip()[:1] != "")
    )


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L (Lin, 2004): the F-measure of the longest common subsequence of words.

    A word is a run of letters and digits of any script, in lower case. If either text has no words, the score is 0.
    """
    return _best_score(
        prediction, references, lambda text, reference: _f_measure(split_words(text), split_words(reference))
    )


def edit_similarity(prediction: str, references: Sequence[str]) -> float:
    """1 - (characters to insert and delete) / (characters of both), without outer white space.

    That is 2 · (length of the longest common subsequence) / (characters of both), the unrounded `fuzz.ratio` of
    rapidfuzz, and of fuzzywuzzy on python-Levenshtein. If either text is empty, the score is 0.
    """
    return _best_score(prediction, references, lambda text, reference: _f_measure(text.strip(), reference.strip()))


def code_similarity(prediction: str, references: Sequence[str]) -> float:
    """Edit similarity of code in the format of Py150.

    Each literal is replaced by its value; a number without a value becomes 0, and a string without a value is removed.
    """
    return edit_similarity(_replace_literals(prediction), [_replace_literals(reference) for reference in references])


def sari(prediction: str, references: Sequence[str], source: str) -> float:
    """SARI (Xu et al., 2016): how well a simplification of `source` keeps, deletes and adds n-grams.

    The mean of twelve numbers: for n = 1, 2, 3 and 4, the F-measure of the kept n-grams, the precision of the deleted
    ones and the F-measure of the added ones. As in Hugging Face's `sari`, 0 / 0 is 1, the recall of kept n-grams counts
    occurrences, and tokens are those of BLEU's 13a tokenizer in lower case.
    """
    _check_references(references)
    before, after, *reference_tokens = (
        _TOKEN_PATTERN.findall(text.lower()) for text in (source, prediction, *references)
    )
    return sum(_sari_of_ngrams(n, before, after, reference_tokens) for n in (1, 2, 3, 4)) / 4


def split_words(text: str) -> list[str]:
    """The lower-cased runs of letters and digits in `text`."""
    return _WORD_PATTERN.findall(text.lower())


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    Bit-parallel (Hyyrö, 2004): one integer holds a row of the usual dynamic-programming table, with a 0 bit at each
    position of `a` where the row's value grows. Each element of `b` costs a few operations on integers.
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    all_ones = (1 << len(a)) - 1
    row_bits = all_ones
    for word in b:
        hits = row_bits & positions.get(word, 0)
        row_bits = ((row_bits + hits) | (row_bits - hits)) & all_ones
    return len(a) - row_bits.bit_count()


def _sari_of_ngrams(n: int, source: Sequence[str], answer: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean of the three measures for one n."""
    # Counts are multiplied by the number of references: an n-gram that half of them keep is half correct to keep.
    before, after = (
        Counter({ngram: count * len(references) for ngram, count in _ngrams(tokens, n).items()})
        for tokens in (source, answer)
    )
    reference_ngrams = sum((_ngrams(reference, n) for reference in references), Counter[tuple[str, ...]]())

    kept_ngrams, correct = before & after, before & after & reference_ngrams
    precision = _ratio(sum(correct[ngram] / kept_ngrams[ngram] for ngram in kept_ngrams), len(kept_ngrams))
    keep_f1 = _harmonic_mean(precision, _ratio(correct.total(), (before & reference_ngrams).total()))

    deleted_ngrams = before - after
    correct = deleted_ngrams - reference_ngrams
    precisions = [correct[ngram] / deleted_ngrams[ngram] for ngram in deleted_ngrams]
    delete_precision = _ratio(sum(precisions), len(deleted_ngrams))

    added_ngrams, addable_ngrams = after.keys() - before.keys(), reference_ngrams.keys() - before.keys()
    hits = len(added_ngrams & addable_ngrams)
    add_f1 = _harmonic_mean(_ratio(hits, len(added_ngrams)), _ratio(hits, len(addable_ngrams)))
    return (keep_f1 + delete_precision + add_f1) / 3


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _ratio(numerator: float, denominator: int) -> float:
    return numerator / denominator if denominator else 1.0


def _harmonic_mean(precision: float, recall: float) -> float:
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _replace_literals(code: str) -> str:
    return _LITERAL_PATTERN.sub(lambda literal: literal[2] or ("0" if literal[0] == "<NUM_LIT>" else ""), code)


def _f_measure(prediction: Sequence[str], reference: Sequence[str]) -> float:
    # 2PR / (P + R) with P = common / len(prediction) and R = common / len(reference)
    total = len(prediction) + len(reference)
    return 2 * common_length(prediction, reference) / total if total else 0.0


def _normalize(text: str) -> str:
    return " ".join(text.lower().split())


def _best_score(prediction: str, references: Sequence[str], score: Callable[[str, str], float]) -> float:
    _check_references(references)
    return max(score(prediction, reference) for reference in references)


def _check_references(references: Sequence[str]) -> None:
    if not references:
        raise ValueError("no reference is given; at least one is needed")
