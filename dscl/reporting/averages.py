"""Means over seeds. If a run lacks a value, there is no mean of it: the result is None."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dscl.maths.scores import ScoreRow


@dataclass(frozen=True)
class MeanStd:
    mean: float
    std: float | None  # sample standard deviation; None if there is a single value


def mean_and_std(values: Sequence[float | None]) -> MeanStd | None:
    """Mean and sample standard deviation; None if a value is missing or there is none."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return MeanStd(math.fsum(known) / len(known), statistics.stdev(known) if len(known) > 1 else None)


def mean(values: Sequence[float | None]) -> float | None:
    result = mean_and_std(values)
    return result.mean if result else None


def mean_matrix(matrices: Sequence[Sequence[ScoreRow]]) -> list[ScoreRow]:
    """The elementwise mean of matrices of the same shape."""
    return [tuple(mean(entries) for entries in zip(*rows, strict=True)) for rows in zip(*matrices, strict=True)]


def smooth_curve(values: Sequence[float], max_points: int) -> list[tuple[float, float]]:
    """Split the values into at most `max_points` intervals of similar length; give each one's (centre, mean).

    Positions count from 1.
    """
    count = min(max_points, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    return [((start + 1 + end) / 2, math.fsum(values[start:end]) / (end - start)) for start, end in pairwise(edges)]
