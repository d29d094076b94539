"""The score matrix and its summary as plain text, for the end of a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dscl.utils.formatting import cells, pad, shorten

_SCORE = 5  # columns of 0.912
_NAME = 10  # a name is not cut to fewer columns
_BEFORE = "before training"
_MEANINGS = {
    "OP": "mean score over the tasks at the end",
    "BWT": "mean change of the earlier tasks since each was learnt",
    "FWT": "mean gain of a task before its own training",
    "forgetting": "mean fall of the earlier tasks from their best",
}


def score_table(document: Mapping[str, Any], width: int | None = None) -> str:
    """A scores document as lines of at most `width` columns (the terminal's, unless given); "-" was not measured.

    Names are cut where that lets all tasks stand side by side; where it does not, the table is broken into several.
    """
    width = max(40, width or shutil.get_terminal_size().columns)
    tasks, before, matrix = document["tasks"], document.get("before"), document["matrix"]
    rows = [before, *matrix] if before else matrix
    longest = max(map(cells, tasks))
    for limit in range(longest, min(longest, _NAME) - 1, -1):
        names = [shorten(name, limit) for name in tasks]
        parts = _parts(names, width)
        if len(parts) == 1:
            break
    labels = [f"after {name}" for name in names[: len(matrix)]]
    if before:
        labels.insert(0, _BEFORE)
    blocks = []
    for part in parts:
        columns = [_column(name) for name in names[part]]
        lines = [" " * _label_width(names) + _line(names[part], columns)]
        for label, row in zip(labels, rows, strict=True):
            lines.append(pad(label, _label_width(names)) + _line(map(_shown, row[part]), columns))
        blocks.append("\n".join(lines))
    given = document.get("given")
    if given:
        shown = ", ".join(f"{name} {_shown(given['summary'][name])}" for name in ("OP", "BWT"))
        blocks.append(f"with the task given: {shown}")
    general = document.get("heldout")
    if general:
        blocks.append(f"held-out loss {general[0]:.3f} before training, {general[-1]:.3f} now")
    return "\n\n".join([*blocks, _summary(document["summary"], width)])


def _parts(names: Sequence[str], width: int) -> list[slice]:
    """The fewest parts of about equal length whose columns fit beside the labels; a column at least in each."""
    room = width - _label_width(names)
    for length in (-(-len(names) // number) for number in range(1, len(names) + 1)):
        parts = [slice(start, start + length) for start in range(0, len(names), length)]
        if all(sum(map(_column, names[part])) <= room for part in parts):
            break
    return parts


def _label_width(names: Sequence[str]) -> int:
    return max(cells(_BEFORE), *(cells(f"after {name}") for name in names))


def _column(name: str) -> int:
    return max(_SCORE, cells(name)) + 2


def _summary(summary: Mapping[str, float | None], width: int) -> str:
    widest = max(map(len, summary))
    lines = []
    for name, value in summary.items():
        line = f"{name.ljust(widest)}  {'-' if value is None else format(value, '.3f'):>6}"
        meaning = f"  {_MEANINGS[name]}"
        lines.append(line + meaning if len(line + meaning) <= width else line)
    return "\n".join(lines)


def _shown(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def _line(entries: Iterable[str], columns: Sequence[int]) -> str:
    return "".join(" " * (column - cells(entry)) + entry for entry, column in zip(entries, columns, strict=True))
