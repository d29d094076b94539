"""Continual-learning summaries (OP, BWT, FWT, forgetting) of one score matrix, and the document that holds them.

`matrix[i][j]` is the score of task j after training task i, counted from 0, and None where it was not measured. Every
row has a column for each task of the stream. A matrix of t rows stands for the t tasks trained so far: every summary
is then over those t tasks alone, so for a finished stream (t = T) it is the usual definition over all of it.
A summary that needs an entry that was not measured is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

Row = Sequence[float | None]
Matrix = Sequence[Row]


def op(matrix: Matrix) -> float | None:
    """Overall performance: the mean of the last row over the tasks trained so far."""
    _check(matrix)
    return _mean(matrix[-1][j] for j in range(len(matrix)))


def bwt(matrix: Matrix) -> float | None:
    """Backward transfer (Lopez-Paz and Ranzato, 2017): the mean change of each earlier task since it was learnt."""
    _check(matrix)
    return _mean(_minus(matrix[-1][j], matrix[j][j]) for j in range(len(matrix) - 1))


def fwt(matrix: Matrix, before: Row | None) -> float | None:
    """Forward transfer (Lopez-Paz and Ranzato, 2017): the mean gain of each task from those trained before it.

    `before` is the row measured before any training.
    """
    _check(matrix, before)
    if before is None:
        return None
    return _mean(_minus(matrix[j - 1][j], before[j]) for j in range(1, len(matrix)))


def forgetting(matrix: Matrix) -> float | None:
    """Forgetting (Chaudhry et al., 2018): the mean fall of each earlier task from its best since it was learnt."""
    _check(matrix)
    last = len(matrix) - 1
    return _mean(_minus(_best([matrix[i][j] for i in range(j, last)]), matrix[last][j]) for j in range(last))


def summary(matrix: Matrix, before: Row | None = None) -> dict[str, float | None]:
    """All four summaries, under the names they have in scores.json."""
    return {
        "OP": op(matrix),
        "BWT": bwt(matrix),
        "FWT": fwt(matrix, before),
        "forgetting": forgetting(matrix),
    }


def build(
    method: str,
    tasks: Sequence[str],
    metrics: Sequence[str],
    matrix: Matrix,
    before: Row | None,
    complete: bool,
) -> dict[str, Any]:
    """The content of scores.json: one matrix row for each task trained so far, and the row before any training."""
    if len(metrics) != len(tasks):
        raise ValueError(f"{len(metrics)} metrics for {len(tasks)} tasks; there must be one each")
    if len(matrix) > len(tasks):
        raise ValueError(f"the score matrix has {len(matrix)} rows for {len(tasks)} tasks; at most one each is allowed")
    if complete and len(matrix) != len(tasks):
        raise ValueError(
            f"the score matrix has {len(matrix)} rows; a complete run of {len(tasks)} tasks needs one each"
        )
    for name, row in _named(matrix, before):
        if len(row) != len(tasks):
            raise ValueError(f"{name} has {len(row)} scores for {len(tasks)} tasks; there must be one each")
        for j, score in enumerate(row):
            if score is not None and not 0.0 <= score <= 1.0:
                raise ValueError(f"{name}[{j}], the score of {tasks[j]!r}, is {score}; it must lie in 0…1")
    return {
        "method": method,
        "tasks": list(tasks),
        "metrics": list(metrics),
        "matrix": [list(row) for row in matrix],
        "before": None if before is None else list(before),
        "summary": summary(matrix, before),
        "complete": complete,
    }


def _check(matrix: Matrix, before: Row | None = None) -> None:
    """Refuse what cannot be a score matrix: unequal rows, more rows than columns, scores that are not finite."""
    rows = list(_named(matrix, before))
    for name, row in rows:
        if len(row) != len(rows[0][1]):
            raise ValueError(f"{name} has {len(row)} scores, {rows[0][0]} has {len(rows[0][1])}; all must be equal")
        if len(row) < len(matrix):
            raise ValueError(f"{name} has {len(row)} scores for {len(matrix)} trained tasks; one each is needed")
        for j, score in enumerate(row):
            if score is not None and not math.isfinite(score):
                raise ValueError(f"{name}[{j}] is {score}; a finite score, or None where not measured, is needed")


def _named(matrix: Matrix, before: Row | None) -> Iterable[tuple[str, Row]]:
    if before is not None:
        yield "before", before
    for i, row in enumerate(matrix):
        yield f"matrix[{i}]", row


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _best(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return max(known) if len(known) == len(values) else None


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, or None when there is nothing to average or something of it is missing."""
    values = list(values)
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
