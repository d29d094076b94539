"""scores.json, read strictly: what is damaged or not finite in it is named, and nothing else comes out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUMMARY = ("OP", "BWT", "FWT", "forgetting")
Numbers = tuple[float | None, ...]


class Damaged(ValueError):
    """A file is not what it should be. The message says which, where, and how."""


@dataclass(frozen=True)
class Shares:
    """Which share of each task's prompts (a row) was answered by which task (a column; None: by none)."""

    tasks: tuple[str, ...]
    answered_by: tuple[str | None, ...]
    values: tuple[Numbers, ...]


@dataclass(frozen=True)
class Scores:
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    matrix: tuple[Numbers, ...]
    before: Numbers | None
    summary: Mapping[str, float | None]
    complete: bool
    heldout: Numbers
    routed: Numbers  # at the end: the share of each task's prompts that its own task answered
    given: Mapping[str, float | None]  # the summary with the task given
    confusion: Shares | None


def read_scores(path: Path) -> Scores | None:
    """None where there is no such file yet."""
    found = read_json(path)
    if found is None:
        return None
    tasks, metrics = _texts(found.get("tasks"), "tasks"), _texts(found.get("metrics"), "metrics")
    if len(metrics) != len(tasks):
        raise _damaged(f"{len(metrics)} metrics for {len(tasks)} tasks")
    rows = found.get("matrix")
    if not isinstance(rows, list) or len(rows) > len(tasks):
        raise _damaged("matrix has no row for each task that was trained")
    matrix = tuple(_row(row, tasks, f"after {name}") for row, name in zip(rows, tasks, strict=False))
    complete = found.get("complete") is True
    if complete and len(matrix) < len(tasks):
        raise _damaged(f"complete, with {len(matrix)} rows for {len(tasks)} tasks")
    before, routed, given = found.get("before"), found.get("routed"), found.get("given")
    return Scores(
        tasks=tasks,
        metrics=metrics,
        matrix=matrix,
        before=None if before is None else _row(before, tasks, "before training"),
        summary=_summary(found.get("summary"), SUMMARY, "summary"),
        complete=complete,
        heldout=tuple(number(entry, "heldout") for entry in _list(found.get("heldout") or [], "heldout")),
        routed=_row(_list(routed, "routed")[-1], tasks, "in routed") if routed else (),
        given=_summary(given.get("summary"), ("OP", "BWT"), "given") if isinstance(given, dict) else {},
        confusion=_shares(found["confusion"]) if found.get("confusion") else None,
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise Damaged(f"{path.name} is damaged: it holds no JSON object")
    return found


def real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def number(found: Any, what: str) -> float | None:
    if found is not None and not real(found):
        raise _damaged(f"{what} is {found!r}, which is no number")
    if found is not None and not math.isfinite(found):
        raise Damaged(f"{what} is {found}")
    return None if found is None else float(found)


def _row(found: Any, names: Sequence[str], when: str) -> Numbers:
    """A number in 0…1 or None for each name."""
    if not isinstance(found, list) or len(found) != len(names):
        raise _damaged(f"the row {when} has no entry for each of {len(names)}")
    row = tuple(number(entry, f"the score of {name} {when}") for entry, name in zip(found, names, strict=True))
    for score, name in zip(row, names, strict=True):
        if score is not None and not 0.0 <= score <= 1.0:
            raise _damaged(f"the score of {name} {when} is {score}, which is not in 0…1")
    return row


def _summary(found: Any, names: Sequence[str], what: str) -> dict[str, float | None]:
    if not isinstance(found, dict):
        raise _damaged(f"it holds no {what}")
    return {name: number(found.get(name), name) for name in names}


def _shares(found: Any) -> Shares:
    if not isinstance(found, dict):
        raise _damaged("confusion is no object")
    tasks = _texts(found.get("tasks"), "confusion")
    columns = _list(found.get("answered_by"), "confusion")
    values = [_row(row, list(map(str, columns)), "in confusion") for row in _list(found.get("shares"), "confusion")]
    if len(values) != len(tasks) or not all(name is None or text(name) for name in columns):
        raise _damaged("confusion has no row or column for each of its names")
    return Shares(tasks, tuple(columns), tuple(values))


def _list(found: Any, what: str) -> list[Any]:
    if not isinstance(found, list):
        raise _damaged(f"{what} is no list")
    return found


def _texts(found: Any, what: str) -> tuple[str, ...]:
    if not found or not all(map(text, _list(found, what))):
        raise _damaged(f"{what} holds no names")
    return tuple(found)


def _damaged(how: str) -> Damaged:
    return Damaged(f"scores.json is damaged: {how}")
