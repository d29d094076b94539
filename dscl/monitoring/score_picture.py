"""Matrices of tasks as images: a coloured cell for each value, with the task names on both axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dscl.maths.scores import ScoreRow
from dscl.methods.base import TaskMatrix
from dscl.monitoring.score_board import ScoreBoard
from dscl.utils.formatting import truncate_middle

CELL = (68, 40)  # width, height in pixels
MARGIN = 16
LABEL_CHARACTERS = 26
INK, MUTED, UNMEASURED, GROUND = (25, 25, 25), (120, 120, 120), (236, 236, 236), (255, 255, 255)

# Dark to light in even steps of brightness, so that the image also reads in grey and to colour-blind eyes.
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)


def score_picture(scores: ScoreBoard) -> np.ndarray:
    """The score matrix as an RGB image, uint8 [height, width, 3].

    Its size depends on the task names only: rows that are still to come are drawn empty.
    """
    names = [truncate_middle(name, LABEL_CHARACTERS) for name in scores.tasks]
    rows = [scores.zero_shot or [None] * len(names), *scores.matrix]
    rows += [[None] * len(names)] * (len(names) + 1 - len(rows))
    return _draw_matrix(names, ["before training", *(f"after {name}" for name in names)], rows, diagonal_offset=-1)


def task_matrix_picture(matrix: TaskMatrix) -> np.ndarray:
    """A method's `TaskMatrix` as an RGB image, with a row and a column for each task."""
    names = [truncate_middle(name, LABEL_CHARACTERS) for name in matrix.tasks]
    return _draw_matrix(names, names, matrix.values, diagonal_offset=0)


def routing_picture(confusion: Mapping[str, Any]) -> np.ndarray:
    """The confusion matrix of routing: shares of each task's prompts (rows) that each task answered (columns)."""
    tasks = [truncate_middle(name, LABEL_CHARACTERS) for name in confusion["tasks"]]
    answered_by = [
        "nobody" if name is None else truncate_middle(name, LABEL_CHARACTERS) for name in confusion["answered_by"]
    ]
    return _draw_matrix(answered_by, tasks, confusion["shares"], diagonal_offset=0)


def _draw_matrix(
    names: Sequence[str], labels: Sequence[str], rows: Sequence[ScoreRow], diagonal_offset: int
) -> np.ndarray:
    """Draw a matrix with `names` over its columns and `labels` beside its rows.

    Cell (i, j) is framed where i + diagonal_offset == j.
    """
    font = ImageFont.load_default(15)
    left = MARGIN + 10 + max(_text_width(font, label) for label in labels)
    longest = max(_text_width(font, name) for name in names)
    is_vertical = longest > CELL[0] - 6
    top = MARGIN + 10 + (longest if is_vertical else 18)
    size = (left + CELL[0] * len(names) + MARGIN, top + CELL[1] * len(rows) + MARGIN)
    image = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(image)

    for j, name in enumerate(names):
        centre = left + CELL[0] * j + CELL[0] // 2
        if is_vertical:
            _draw_vertical_text(image, name, font, centre, top - 8)
        else:
            draw.text((centre, top - 8), name, INK, font, anchor="ms")
    for i, (label, row) in enumerate(zip(labels, rows, strict=True)):
        y = top + CELL[1] * i
        draw.text((left - 8, y + CELL[1] // 2), label, INK, font, anchor="rm")
        for j, score in enumerate(row):
            _draw_cell(draw, font, (left + CELL[0] * j, y), score, has_frame=i + diagonal_offset == j)
    return np.asarray(image)


def _draw_cell(
    draw: ImageDraw.ImageDraw, font: Any, corner: tuple[int, int], score: float | None, has_frame: bool
) -> None:
    x, y = corner
    box = (x + 1, y + 1, x + CELL[0] - 2, y + CELL[1] - 2)
    fill = UNMEASURED if score is None else _colour_of(score)
    draw.rectangle(box, fill=fill, outline=INK if has_frame else None, width=2)
    text = "-" if score is None else f"{score:.3f}"
    is_bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140
    ink = MUTED if score is None else INK if is_bright else GROUND
    draw.text((x + CELL[0] // 2, y + CELL[1] // 2), text, ink, font, anchor="mm")


def _colour_of(score: float) -> tuple[int, int, int]:
    position = min(max(score, 0.0), 1.0) * (len(_COLOURS) - 1)
    low = min(int(position), len(_COLOURS) - 2)
    r, g, b = _COLOURS[low] + (position - low) * (_COLOURS[low + 1] - _COLOURS[low])
    return round(r), round(g), round(b)


def _draw_vertical_text(image: Image.Image, text: str, font: Any, centre: int, bottom: int) -> None:
    """Draw `text` from bottom to top, centred at x = `centre` and starting at y = `bottom`."""
    strip = Image.new("RGB", (_text_width(font, text), 20), GROUND)
    ImageDraw.Draw(strip).text((0, 10), text, INK, font, anchor="lm")
    rotated = strip.rotate(90, expand=True)
    image.paste(rotated, (centre - rotated.width // 2, bottom - rotated.height))


def _text_width(font: Any, text: str) -> int:
    return int(font.getlength(text)) + 1
