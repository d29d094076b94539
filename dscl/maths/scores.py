"""Continual-learning metrics (OP, BWT, FWT, forgetting) of a score matrix.

`matrix[i][j]` is the score of task j after training on task i, counted from 0, or None if it was not measured. Every
row has a column for each task of the stream. A matrix with t rows stands for the t tasks trained so far; the metrics
are then computed over these t tasks, which for a finished stream (t = T) is their usual definition. A metric that needs
an entry that was not measured is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

ScoreRow = Sequence[float | None]
ScoreMatrix = Sequence[ScoreRow]
SUMMARY_KEYS = ("OP", "BWT", "FWT", "forgetting")  # names of the metrics in scores.json


def overall_performance(matrix: ScoreMatrix) -> float | None:
    """OP: the mean score of the tasks trained so far, after the last one."""
    _check_matrix(matrix)
    return _mean_if_complete(matrix[-1][j] for j in range(len(matrix)))


def backward_transfer(matrix: ScoreMatrix) -> float | None:
    """BWT (Lopez-Paz and Ranzato, 2017): the mean change of each earlier task's score since it was learned."""
    _check_matrix(matrix)
    return _mean_if_complete(_difference(matrix[-1][j], matrix[j][j]) for j in range(len(matrix) - 1))


def forward_transfer(matrix: ScoreMatrix, zero_shot: ScoreRow | None) -> float | None:
    """FWT (Lopez-Paz and Ranzato, 2017): the mean gain of each task, before it is trained, from the earlier tasks.

    `zero_shot` holds the scores before any training.
    """
    _check_matrix(matrix, zero_shot)
    if zero_shot is None:
        return None
    return _mean_if_complete(_difference(matrix[j - 1][j], zero_shot[j]) for j in range(1, len(matrix)))


def forgetting(matrix: ScoreMatrix) -> float | None:
    """Forgetting (Chaudhry et al., 2018): the mean drop of each earlier task from its best score since its training."""
    _check_matrix(matrix)
    last = len(matrix) - 1
    return _mean_if_complete(
        _difference(_max_if_complete([matrix[i][j] for i in range(j, last)]), matrix[last][j]) for j in range(last)
    )


def summarize(matrix: ScoreMatrix, zero_shot: ScoreRow | None = None) -> dict[str, float | None]:
    """The four metrics, under their names in scores.json."""
    return {
        "OP": overall_performance(matrix),
        "BWT": backward_transfer(matrix),
        "FWT": forward_transfer(matrix, zero_shot),
        "forgetting": forgetting(matrix),
    }


def _check_matrix(matrix: ScoreMatrix, zero_shot: ScoreRow | None = None) -> None:
    """Raise ValueError for rows of unequal length, more rows than columns, or scores that are not finite."""
    rows = list(_named_rows(matrix, zero_shot))
    for name, row in rows:
        if len(row) != len(rows[0][1]):
            raise ValueError(f"{name} has {len(row)} scores, {rows[0][0]} has {len(rows[0][1])}; all must be equal")
        if len(row) < len(matrix):
            raise ValueError(f"{name} has {len(row)} scores for {len(matrix)} trained tasks; one each is needed")
        for j, score in enumerate(row):
            if score is not None and not math.isfinite(score):
                raise ValueError(f"{name}[{j}] is {score}; a finite score, or None where not measured, is needed")


def _named_rows(matrix: ScoreMatrix, zero_shot: ScoreRow | None) -> Iterable[tuple[str, ScoreRow]]:
    if zero_shot is not None:
        yield "zero_shot", zero_shot
    for i, row in enumerate(matrix):
        yield f"matrix[{i}]", row


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _max_if_complete(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return max(measured) if len(measured) == len(values) else None


def _mean_if_complete(values: Iterable[float | None]) -> float | None:
    """The mean, or None if there are no values or one of them is None."""
    values = list(values)
    measured = [value for value in values if value is not None]
    return math.fsum(measured) / len(measured) if measured and len(measured) == len(values) else None
