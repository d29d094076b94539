"""The score matrix and its summary as plain text, for the end of a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence

from dscl.monitoring.score_board import ScoreBoard
from dscl.utils.formatting import display_width, pad_to_width, truncate_middle

_SCORE_WIDTH = 5  # columns of "0.912"
_MIN_NAME_WIDTH = 10  # names are not truncated to fewer columns
_BEFORE_LABEL = "before training"
_MEANINGS = {
    "OP": "mean score over the tasks at the end",
    "BWT": "mean change of the earlier tasks since each was learnt",
    "FWT": "mean gain of a task before its own training",
    "forgetting": "mean fall of the earlier tasks from their best",
}


def score_table(scores: ScoreBoard, width: int | None = None) -> str:
    """The scores as text of at most `width` columns (default: the terminal's); "-" marks missing scores.

    Task names are truncated if the table then fits; otherwise it is split into several tables.
    """
    width = max(40, width or shutil.get_terminal_size().columns)
    tasks, zero_shot, matrix = scores.tasks, scores.zero_shot, scores.matrix
    rows = [zero_shot, *matrix] if zero_shot else matrix
    longest = max(map(display_width, tasks))
    for limit in range(longest, min(longest, _MIN_NAME_WIDTH) - 1, -1):
        names = [truncate_middle(name, limit) for name in tasks]
        parts = _split_columns(names, width)
        if len(parts) == 1:
            break
    labels = [f"after {name}" for name in names[: len(matrix)]]
    if zero_shot:
        labels.insert(0, _BEFORE_LABEL)
    blocks = []
    for part in parts:
        widths = [_column_width(name) for name in names[part]]
        lines = [" " * _label_width(names) + _format_row(names[part], widths)]
        for label, row in zip(labels, rows, strict=True):
            lines.append(pad_to_width(label, _label_width(names)) + _format_row(map(_format_score, row[part]), widths))
        blocks.append("\n".join(lines))
    if scores.oracle_rows:
        summary = ", ".join(f"{name} {_format_score(scores.oracle_summary[name])}" for name in ("OP", "BWT"))
        blocks.append(f"with the true task of every prompt: {summary}")
    if heldout_losses := scores.heldout_losses:
        blocks.append(f"held-out loss {heldout_losses[0]:.3f} before training, {heldout_losses[-1]:.3f} now")
    return "\n\n".join([*blocks, _format_summary(scores.summary, width)])


def _split_columns(names: Sequence[str], width: int) -> list[slice]:
    """Split the columns into the fewest equal parts that fit beside the labels; at worst into single columns."""
    available = width - _label_width(names)
    for length in (-(-len(names) // number) for number in range(1, len(names) + 1)):
        parts = [slice(start, start + length) for start in range(0, len(names), length)]
        if all(sum(map(_column_width, names[part])) <= available for part in parts):
            break
    return parts


def _label_width(names: Sequence[str]) -> int:
    return max(display_width(_BEFORE_LABEL), *(display_width(f"after {name}") for name in names))


def _column_width(name: str) -> int:
    return max(_SCORE_WIDTH, display_width(name)) + 2


def _format_summary(summary: Mapping[str, float | None], width: int) -> str:
    widest = max(map(len, summary))
    lines = []
    for name, value in summary.items():
        line = f"{name.ljust(widest)}  {'-' if value is None else format(value, '.3f'):>6}"
        meaning = f"  {_MEANINGS[name]}"
        lines.append(line + meaning if len(line + meaning) <= width else line)
    return "\n".join(lines)


def _format_score(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def _format_row(entries: Iterable[str], widths: Sequence[int]) -> str:
    """The entries side by side, each right-aligned in its column's width."""
    return "".join(" " * (width - display_width(entry)) + entry for entry, width in zip(entries, widths, strict=True))
