"""Read scores.json strictly: damaged or non-finite content raises DamagedFileError, which names the place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dscl.maths.scores import SUMMARY_KEYS
from dscl.monitoring.score_board import ScoreBoard
from dscl.utils.json_files import parse_json_object


class DamagedFileError(ValueError):
    """A file has unexpected content. The message says which file, where and how."""


def read_scores(path: Path) -> ScoreBoard | None:
    """Read and check a scores.json; None if there is no such file yet."""
    document = read_json(path)
    if document is None:
        return None
    tasks, metrics = _check_names(document.get("tasks"), "tasks"), _check_names(document.get("metrics"), "metrics")
    if len(metrics) != len(tasks):
        raise _scores_error(f"{len(metrics)} metrics for {len(tasks)} tasks")
    rows = _check_list(document.get("matrix"), "matrix")
    if len(rows) > len(tasks):
        raise _scores_error("matrix has no row for each task that was trained")
    for row, name in zip(rows, tasks, strict=False):
        _check_score_row(row, tasks, f"after {name}")
    if document.get("complete") is True and len(rows) < len(tasks):
        raise _scores_error(f"complete, with {len(rows)} rows for {len(tasks)} tasks")
    summary = document.get("summary")
    if not isinstance(summary, dict):
        raise _scores_error("it holds no summary")
    for name in SUMMARY_KEYS:
        _check_number(summary.get(name), name)
    if document.setdefault("zero_shot", None) is not None:
        _check_score_row(document["zero_shot"], tasks, "before training")
    for name in ("routing_accuracy", "rejected_share"):
        for row in _check_list(document.setdefault(name, []), name):
            _check_score_row(row, tasks, f"in {name}")
    for entry in _check_list(document.setdefault("heldout", []), "heldout"):
        _check_number(entry, "heldout")
    if oracle := document.get("oracle_task_id"):
        oracle_rows = _check_list(oracle.get("matrix") if isinstance(oracle, dict) else None, "oracle_task_id")
        for row in oracle_rows:
            _check_score_row(row, tasks, "in oracle_task_id")
    if confusion := document.get("confusion"):
        _check_confusion(confusion)
    try:
        return ScoreBoard.from_json(document)
    except (ValueError, LookupError, StopIteration) as error:
        raise _scores_error(str(error) or type(error).__name__) from None


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file that holds a JSON object; None if there is no such file."""
    try:
        return parse_json_object(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path.name} is damaged: {error}") from None


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_nonempty_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _check_number(value: Any, label: str) -> float | None:
    """The value as a float; None stays None."""
    if value is not None and not is_number(value):
        raise _scores_error(f"{label} is {value!r}, which is no number")
    if value is not None and not math.isfinite(value):
        raise DamagedFileError(f"{label} is {value}")
    return None if value is None else float(value)


def _check_score_row(values: Any, names: Sequence[str], position: str) -> None:
    """A row of scores: a number in 0…1 or None for each name. `position` says in errors which row it is."""
    if not isinstance(values, list) or len(values) != len(names):
        raise _scores_error(f"the row {position} has no entry for each of {len(names)}")
    row = tuple(
        _check_number(value, f"the score of {name} {position}") for value, name in zip(values, names, strict=True)
    )
    for score, name in zip(row, names, strict=True):
        if score is not None and not 0.0 <= score <= 1.0:
            raise _scores_error(f"the score of {name} {position} is {score}, which is not in 0…1")


def _check_confusion(document: Any) -> None:
    if not isinstance(document, dict):
        raise _scores_error("confusion is no object")
    tasks = _check_names(document.get("tasks"), "confusion")
    columns = _check_list(document.get("answered_by"), "confusion")
    rows = _check_list(document.get("shares"), "confusion")
    for row in rows:
        _check_score_row(row, list(map(str, columns)), "in confusion")
    if len(rows) != len(tasks) or not all(name is None or is_nonempty_text(name) for name in columns):
        raise _scores_error("confusion has no row or column for each of its names")


def _check_list(value: Any, label: str) -> list[Any]:
    if not isinstance(value, list):
        raise _scores_error(f"{label} is no list")
    return value


def _check_names(value: Any, label: str) -> tuple[str, ...]:
    if not value or not all(map(is_nonempty_text, _check_list(value, label))):
        raise _scores_error(f"{label} holds no names")
    return tuple(value)


def _scores_error(problem: str) -> DamagedFileError:
    return DamagedFileError(f"scores.json is damaged: {problem}")
