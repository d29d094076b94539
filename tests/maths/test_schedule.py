"""The learning rate: its shape, against formulas worked out by hand."""

from __future__ import annotations

import math

import pytest

from dscl.maths.schedule import SCHEDULES, learning_rate


def rates(steps: int, kind: str, warmup: float, peak: float = 2.0) -> list[float]:
    return [learning_rate(step, steps, peak=peak, kind=kind, warmup=warmup) for step in range(steps)]


def test_values_by_hand() -> None:
    assert rates(4, "linear", 0.0) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates(6, "linear", 1 / 3) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    assert rates(4, "cosine", 0.0) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])
    assert rates(4, "constant", 0.5) == pytest.approx([1.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.07, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_rises_to_the_peak_then_falls_and_is_never_zero(kind: str, warmup: float, steps: int) -> None:
    values = rates(steps, kind, warmup)
    top = values.index(max(values))
    assert values[top] == 2.0  # reached exactly
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert min(values) > 0.0


def test_rise_takes_its_share_of_the_steps() -> None:
    for share in range(1, 100):
        assert rates(100, "linear", share / 100).index(2.0) == share - 1
    assert rates(10, "linear", 0.01)[0] == 2.0  # a share of less than a step is one step, of the full rate


def test_everything_scales_with_the_peak() -> None:
    assert rates(9, "cosine", 0.2, peak=6.0) == pytest.approx([3 * value for value in rates(9, "cosine", 0.2)])


def test_unknown_kind_is_no_schedule() -> None:
    with pytest.raises(AssertionError):
        rates(3, "quadratic", 0.0)
