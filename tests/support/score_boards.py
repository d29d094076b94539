"""Score boards from plain score matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dscl.monitoring.score_board import ScoreBoard


def make_score_board(
    matrix: Sequence[Any], zero_shot: Sequence[Any] | None = None, tasks: Sequence[str] = ("a", "b"), **entries: Any
) -> ScoreBoard:
    """A board with these scores; `entries`: further ones of scores.json."""
    document = {
        "method": "m",
        "tasks": tasks,
        "metrics": ["accuracy"] * len(tasks),
        "matrix": matrix,
        "zero_shot": zero_shot,
        **entries,
    }
    return ScoreBoard.from_json(document)
