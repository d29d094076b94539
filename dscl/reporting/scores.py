"""Read scores.json strictly: damaged or non-finite content raises DamagedFileError, which names the place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUMMARY_KEYS = ("OP", "BWT", "FWT", "forgetting")
OptionalFloats = tuple[float | None, ...]


class DamagedFileError(ValueError):
    """A file has unexpected content. The message says which file, where and how."""


@dataclass(frozen=True)
class ConfusionMatrix:
    """Which share of each task's prompts was answered by which task."""

    tasks: tuple[str, ...]  # the rows: the prompts' tasks
    answered_by: tuple[str | None, ...]  # the columns: the tasks that answered; None: the base model
    shares: tuple[OptionalFloats, ...]  # [tasks, answered_by]


@dataclass(frozen=True)
class RunScores:
    """The content of a scores.json."""

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    matrix: tuple[OptionalFloats, ...]  # [tasks trained, tasks]: the score of each task after each training
    zero_shot_scores: OptionalFloats | None  # each task's score before any training
    summary: Mapping[str, float | None]  # OP, BWT, FWT and forgetting
    complete: bool
    heldout_losses: OptionalFloats  # before training and after each task
    routing_accuracy: OptionalFloats  # at the end: the share of each task's prompts that its own task answered
    oracle_summary: Mapping[str, float | None]  # OP and BWT of an evaluation that was told each prompt's task
    confusion: ConfusionMatrix | None


def read_scores(path: Path) -> RunScores | None:
    """Read and check a scores.json; None if there is no such file yet."""
    document = read_json(path)
    if document is None:
        return None
    tasks, metrics = _check_names(document.get("tasks"), "tasks"), _check_names(document.get("metrics"), "metrics")
    if len(metrics) != len(tasks):
        raise _scores_error(f"{len(metrics)} metrics for {len(tasks)} tasks")
    rows = document.get("matrix")
    if not isinstance(rows, list) or len(rows) > len(tasks):
        raise _scores_error("matrix has no row for each task that was trained")
    matrix = tuple(_check_score_row(row, tasks, f"after {name}") for row, name in zip(rows, tasks, strict=False))
    complete = document.get("complete") is True
    if complete and len(matrix) < len(tasks):
        raise _scores_error(f"complete, with {len(matrix)} rows for {len(tasks)} tasks")
    zero_shot_scores, routed, oracle = document.get("before"), document.get("routed"), document.get("given")
    return RunScores(
        tasks=tasks,
        metrics=metrics,
        matrix=matrix,
        zero_shot_scores=(
            None if zero_shot_scores is None else _check_score_row(zero_shot_scores, tasks, "before training")
        ),
        summary=_check_summary(document.get("summary"), SUMMARY_KEYS, "summary"),
        complete=complete,
        heldout_losses=tuple(
            _check_number(entry, "heldout") for entry in _check_list(document.get("heldout") or [], "heldout")
        ),
        routing_accuracy=_check_score_row(_check_list(routed, "routed")[-1], tasks, "in routed") if routed else (),
        oracle_summary=(
            _check_summary(oracle.get("summary"), ("OP", "BWT"), "given") if isinstance(oracle, dict) else {}
        ),
        confusion=_parse_confusion(document["confusion"]) if document.get("confusion") else None,
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file that holds a JSON object; None if there is no such file."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path.name} is damaged: {error}") from None
    if not isinstance(document, dict):
        raise DamagedFileError(f"{path.name} is damaged: it holds no JSON object")
    return document


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


def _check_score_row(values: Any, names: Sequence[str], position: str) -> OptionalFloats:
    """A row of scores: a number in 0…1 or None for each name. `position` says in errors which row it is."""
    if not isinstance(values, list) or len(values) != len(names):
        raise _scores_error(f"the row {position} has no entry for each of {len(names)}")
    row = tuple(
        _check_number(value, f"the score of {name} {position}") for value, name in zip(values, names, strict=True)
    )
    for score, name in zip(row, names, strict=True):
        if score is not None and not 0.0 <= score <= 1.0:
            raise _scores_error(f"the score of {name} {position} is {score}, which is not in 0…1")
    return row


def _check_summary(summary: Any, names: Sequence[str], label: str) -> dict[str, float | None]:
    """The named numbers of a summary; None for those that are missing."""
    if not isinstance(summary, dict):
        raise _scores_error(f"it holds no {label}")
    return {name: _check_number(summary.get(name), name) for name in names}


def _parse_confusion(document: Any) -> ConfusionMatrix:
    if not isinstance(document, dict):
        raise _scores_error("confusion is no object")
    tasks = _check_names(document.get("tasks"), "confusion")
    columns = _check_list(document.get("answered_by"), "confusion")
    rows = _check_list(document.get("shares"), "confusion")
    shares = [_check_score_row(row, list(map(str, columns)), "in confusion") for row in rows]
    if len(shares) != len(tasks) or not all(name is None or is_nonempty_text(name) for name in columns):
        raise _scores_error("confusion has no row or column for each of its names")
    return ConfusionMatrix(tasks, tuple(columns), tuple(shares))


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
