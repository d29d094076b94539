"""scores.json is the contract, and a board is the same after a restart."""

from __future__ import annotations

import json
import math

import pytest

from dscl.monitoring.score_board import EvalResult, ScoreBoard
from tests.support.score_boards import make_score_board


def small_board(**changes: object) -> ScoreBoard:
    return make_score_board(**{"matrix": [[0.9, 0.2], [0.4, 0.8]], "zero_shot": [0.1, 0.3], **changes})  # type: ignore[arg-type]


def test_the_document_is_the_contract_and_survives_json() -> None:
    document = small_board().to_json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert set(document) == {"method", "tasks", "metrics", "matrix", "zero_shot", "summary", "complete"}
    assert document["summary"] == pytest.approx({"OP": 0.6, "BWT": -0.5, "FWT": -0.1, "forgetting": 0.5})
    assert document["complete"]
    empty = small_board(matrix=[], zero_shot=None)
    assert empty.is_empty
    assert empty.to_json()["summary"]["OP"] is None
    assert not empty.to_json()["complete"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["accuracy"]}, "1 metrics for 2 tasks"),
        ({"matrix": [[0.1, 0.2]] * 3}, "3 rows for 2 tasks"),
        ({"matrix": [[0.1, 0.2], [0.1]]}, r"matrix\[1\] has 1 scores"),
        ({"zero_shot": [0.1]}, "zero_shot has 1 scores"),
        ({"matrix": [[0.1, 0.2], [0.1, 80.0]]}, r"matrix\[1\]\[1\], the score of 'b', is 80.0"),
        ({"zero_shot": [0.1, math.nan]}, r"zero_shot\[1\], the score of 'b', is nan"),
    ],
)
def test_a_document_of_the_wrong_shape_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_board(**changes).to_json()


def routed_board() -> ScoreBoard:
    first = EvalResult(0.5, 0.75, 0.25, ((None, 0.25), ("a", 0.75)))
    last = EvalResult(0.25, 0.5, 0.0, (("a", 0.5), ("b", 0.5)))
    return ScoreBoard(
        "asr",
        ("a", "b"),
        ("accuracy", "accuracy"),
        zero_shot=[0.0, 0.125],
        rows=[[first, None], [last, EvalResult(1.0, 1.0, 0.0, (("b", 1.0),))]],
        oracle_rows=[[EvalResult(0.75), None], [EvalResult(0.5), EvalResult(1.0)]],
        heldout_losses=[3.5, 3.75, 4.0],
    )


def test_routing_stands_in_the_document() -> None:
    document = routed_board().to_json()
    assert document["routing_accuracy"] == [[0.75, None], [0.5, 1.0]]
    assert document["rejected_share"] == [[0.25, None], [0.0, 0.0]]
    assert document["confusion"] == {
        "tasks": ["a", "b"],
        "answered_by": ["a", "b", None],
        "shares": [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]],
    }
    assert document["oracle_task_id"]["matrix"] == [[0.75, None], [0.5, 1.0]]
    assert document["oracle_task_id"]["summary"]["BWT"] == -0.25
    assert document["heldout"] == [3.5, 3.75, 4.0]


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_a_board_is_the_same_after_a_restart(num_rows: int) -> None:
    board = routed_board()
    board.rows, board.oracle_rows = board.rows[:num_rows], board.oracle_rows[:num_rows]
    again = ScoreBoard.from_json(json.loads(json.dumps(board.to_json())))
    assert again.to_json() == board.to_json()
    assert again.rows[-1:] == board.rows[-1:]


def test_the_last_evaluation_that_took_place_gives_the_confusion() -> None:
    board = routed_board()
    board.rows[1] = [None, None]  # evaluate.every: no task was due
    assert board.confusion == {"tasks": ["a"], "answered_by": ["a", "b", None], "shares": [[0.75, 0.0, 0.25]]}
    assert ScoreBoard.from_json(board.to_json()).to_json() == board.to_json()
