"""Matrices of tasks as images for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from dscl.methods.base import TaskMatrix
from dscl.monitoring.heat_map import (
    CELL_HEIGHT,
    CELL_WIDTH,
    EDGE_COLOUR,
    HEAT_COLOUR,
    HIGH_INK,
    LOW_INK,
    Cell,
    HeatMap,
    draw_heat_map,
    needs_high_ink,
)
from dscl.monitoring.score_board import ScoreBoard

SCALE = 2  # image pixels for a pixel of the layout
MARGIN = 8  # around the heat map, in pixels of the layout


def score_picture(scores: ScoreBoard) -> np.ndarray:
    """The score matrix as an RGB image, uint8 [height, width, 3].

    Its size depends on the task names only: rows that are still to come are drawn empty.
    """
    names = scores.tasks
    rows = [scores.zero_shot or [None] * len(names), *scores.matrix]
    rows += [[None] * len(names)] * (len(names) + 1 - len(rows))
    return _draw_picture(
        HeatMap(rows, ["before training", *(f"after {name}" for name in names)], names, framed=[None, *names])
    )


def task_matrix_picture(matrix: TaskMatrix) -> np.ndarray:
    """A method's `TaskMatrix` as an RGB image, with a row and a column for each task."""
    return _draw_picture(HeatMap(matrix.values, matrix.tasks, matrix.tasks))


def routing_picture(confusion: Mapping[str, Any]) -> np.ndarray:
    """The confusion matrix of routing: shares of each task's prompts (rows) that each task answered (columns)."""
    answered_by = ["nobody" if name is None else name for name in confusion["answered_by"]]
    return _draw_picture(HeatMap(confusion["shares"], confusion["tasks"], answered_by))


def _draw_picture(heat_map: HeatMap) -> np.ndarray:
    canvas = PixelCanvas()
    draw_heat_map(canvas, heat_map)
    return np.asarray(canvas.image)


class PixelCanvas:
    """Draws into an RGB image, in the colours of the report's light theme."""

    label_width = 26

    def resize(self, width: float, height: float) -> None:
        size = math.ceil((width + 2 * MARGIN) * SCALE), math.ceil((height + 2 * MARGIN) * SCALE)
        self.image = Image.new("RGB", size, "white")
        self._draw = ImageDraw.Draw(self.image)
        self._font = ImageFont.load_default(11 * SCALE)

    def add_row_label(self, x: float, y: float, text: str) -> None:
        self._draw.text(_to_pixels(x, y), text, LOW_INK, self._font, anchor="rs")

    def add_column_label(self, x: float, y: float, text: str, is_rotated: bool) -> None:
        centre_x, centre_y = _to_pixels(x, y)
        if not is_rotated:
            self._draw.text((centre_x, centre_y), text, LOW_INK, self._font, anchor="ms")
            return
        length = int(self._font.getlength(text)) + 20 * SCALE
        strip = Image.new("L", (2 * length, 2 * length), 0)  # the text starts at its centre and turns around it
        ImageDraw.Draw(strip).text((length, length), text, 255, self._font, anchor="ls")
        rotated = strip.rotate(45, Image.Resampling.BICUBIC)
        self.image.paste(LOW_INK, (centre_x - length, centre_y - length), rotated)

    def add_cell(self, cell: Cell) -> None:
        x, y = _to_pixels(cell.x + 1, cell.y + 1)
        box = (x, y, x + (CELL_WIDTH - 2) * SCALE - 1, y + (CELL_HEIGHT - 2) * SCALE - 1)
        if cell.value is None:
            self._draw.rectangle(box, outline=EDGE_COLOUR, width=SCALE)
            return
        edge = LOW_INK if cell.framed else EDGE_COLOUR
        self._draw.rectangle(box, fill=_cell_colour(cell.value), outline=edge, width=SCALE)
        centre = _to_pixels(cell.x + CELL_WIDTH / 2, cell.y + CELL_HEIGHT / 2)
        ink = HIGH_INK if needs_high_ink(cell.value) else LOW_INK
        self._draw.text(centre, f"{cell.value:.3f}", ink, self._font, anchor="mm")


def _to_pixels(x: float, y: float) -> tuple[int, int]:
    return round((x + MARGIN) * SCALE), round((y + MARGIN) * SCALE)


def _cell_colour(value: float) -> tuple[int, int, int]:
    """The heat colour with this opacity on white."""
    opacity = min(max(value, 0.0), 1.0)
    red, green, blue = (round(255 + opacity * (part - 255)) for part in ImageColor.getrgb(HEAT_COLOUR)[:3])
    return red, green, blue
