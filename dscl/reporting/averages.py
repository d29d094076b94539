"""Means over seeds. Where something was not measured in one of the runs there is no mean of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dscl.reporting.scores import Numbers


@dataclass(frozen=True)
class Figure:
    mean: float
    std: float | None  # of the sample; None of a single one


def figure(values: Sequence[float | None]) -> Figure | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Figure(math.fsum(known) / len(known), statistics.stdev(known) if len(known) > 1 else None)


def mean(values: Sequence[float | None]) -> float | None:
    found = figure(values)
    return found.mean if found else None


def mean_rows(matrices: Sequence[Sequence[Numbers]]) -> list[Numbers]:
    """Entry by entry; the matrices have the same shape."""
    return [tuple(mean(entries) for entries in zip(*rows, strict=True)) for rows in zip(*matrices, strict=True)]


def smooth(values: Sequence[float], points: int) -> list[tuple[float, float]]:
    """(position, mean) of at most so many stretches of about equal length, positions counted from 1."""
    count = min(points, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    return [((start + 1 + end) / 2, math.fsum(values[start:end]) / (end - start)) for start, end in pairwise(edges)]
