"""The summaries of a score matrix against their definitions as loops, and invariants of any matrix."""

from __future__ import annotations

import math
import random

import pytest

from dscl.maths.scores import (
    backward_transfer,
    forgetting,
    forward_transfer,
    overall_performance,
    summarize,
)


def random_matrix(seed: int, trained: int, tasks: int) -> tuple[list[list[float]], list[float]]:
    draw = random.Random(seed)
    rows = [[draw.random() for _ in range(tasks)] for _ in range(trained + 1)]
    return rows[1:], rows[0]


def by_definition(matrix: list[list[float]], before: list[float]) -> dict[str, float]:
    t = len(matrix)
    backward = forward = fall = 0.0
    for j in range(t - 1):
        backward += matrix[t - 1][j] - matrix[j][j]
        best = -1.0
        for i in range(t - 1):
            if i >= j and matrix[i][j] > best:
                best = matrix[i][j]
        fall += best - matrix[t - 1][j]
    for j in range(1, t):
        forward += matrix[j - 1][j] - before[j]
    total = 0.0
    for j in range(t):
        total += matrix[t - 1][j]
    return {"OP": total / t, "BWT": backward / (t - 1), "FWT": forward / (t - 1), "forgetting": fall / (t - 1)}


@pytest.mark.parametrize(("trained", "tasks"), [(2, 2), (3, 3), (5, 5), (15, 15), (2, 5), (4, 5)])
def test_summary_is_the_definition_over_the_tasks_trained_so_far(trained: int, tasks: int) -> None:
    for seed in range(20):
        matrix, before = random_matrix(seed, trained, tasks)
        assert summarize(matrix, before) == pytest.approx(by_definition(matrix, before))


def test_by_hand() -> None:
    matrix = [[0.9, 0.4, 0.2], [0.95, 0.8, 0.1], [0.5, 0.6, 0.7]]
    assert summarize(matrix, [0.3, 0.3, 0.3]) == pytest.approx(
        {
            "OP": 0.6,
            "BWT": (-0.4 - 0.2) / 2,
            "FWT": (0.1 - 0.2) / 2,
            "forgetting": (0.45 + 0.2) / 2,  # the first task was at its best after the second
        }
    )


def test_identity_matrix_is_forgotten_whole() -> None:
    identity = [[float(i == j) for j in range(4)] for i in range(4)]
    assert summarize(identity, [0.0] * 4) == {"OP": 0.25, "BWT": -1.0, "FWT": 0.0, "forgetting": 1.0}


def test_constant_matrix_has_no_transfer() -> None:
    matrix = [[0.5] * 3] * 3
    assert summarize(matrix, [0.5] * 3) == {"OP": 0.5, "BWT": 0.0, "FWT": 0.0, "forgetting": 0.0}


def test_backward_transfer_is_not_clipped_and_bounds_forgetting() -> None:
    assert backward_transfer([[0.2, 0.0], [0.7, 0.9]]) == pytest.approx(0.5)
    assert forgetting([[0.2, 0.0], [0.7, 0.9]]) == pytest.approx(-0.5)
    for seed in range(20):
        matrix, _ = random_matrix(seed, 5, 5)
        assert forgetting(matrix) >= -backward_transfer(matrix) - 1e-12  # type: ignore[operator]


def test_too_few_tasks_for_a_transfer() -> None:
    assert summarize([[0.7, 0.1]], [0.2, 0.2]) == {"OP": 0.7, "BWT": None, "FWT": None, "forgetting": None}
    assert summarize([], [0.2, 0.2]) == {"OP": None, "BWT": None, "FWT": None, "forgetting": None}


def test_no_row_before_training_leaves_only_forward_transfer_open() -> None:
    matrix, before = random_matrix(0, 3, 3)
    with_it, without = summarize(matrix, before), summarize(matrix, None)
    assert without == {**with_it, "FWT": None}


def test_a_missing_entry_gives_none_exactly_where_it_is_needed() -> None:
    """Each entry in turn is taken out; a summary is None if it depends on the entry, else unchanged."""
    whole, start = random_matrix(3, 4, 4)
    expected = summarize(whole, start)
    for i in range(-1, 4):
        for j in range(4):
            rows = [list(start), *[list(row) for row in whole]]
            rows[i + 1][j] = None  # type: ignore[call-overload]
            before, matrix = rows[0], rows[1:]
            needed = {
                "OP": i == 3,
                "BWT": j < 3 and i in (j, 3),
                "FWT": j > 0 and i in (-1, j - 1),
                "forgetting": j < 3 and i >= j,
            }
            for name, value in summarize(matrix, before).items():
                assert value == (None if needed[name] else expected[name]), (name, i, j)


def test_evaluating_only_the_tasks_seen_so_far_leaves_forward_transfer_open() -> None:
    matrix = [[0.9, None, None], [0.5, 0.8, None], [0.4, 0.6, 0.7]]
    assert overall_performance(matrix) == pytest.approx(1.7 / 3)
    assert backward_transfer(matrix) == pytest.approx((-0.5 - 0.2) / 2)
    assert forward_transfer(matrix, [0.1, 0.1, 0.1]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "measure",
    [
        overall_performance,
        backward_transfer,
        forgetting,
        lambda m: forward_transfer(m, None),
        lambda m: forward_transfer([[0.5] * 2], m[1]),
    ],
)
def test_a_score_that_is_not_finite_is_named(bad: float, measure) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"(matrix\[1\]|zero_shot)\[0\] is (nan|inf)"):
        measure([[0.5, 0.5], [bad, 0.5]])


def test_rows_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matrix\[1\] has 1 scores, matrix\[0\] has 2"):
        overall_performance([[0.5, 0.5], [0.5]])
    with pytest.raises(ValueError, match="1 scores for 2 trained tasks"):
        overall_performance([[0.5], [0.5]])
