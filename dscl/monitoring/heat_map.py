"""Heat maps of tasks: one function places labels and cells; a canvas draws them, as SVG or as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dscl.utils.formatting import display_width, truncate_middle

CELL_WIDTH, CELL_HEIGHT = 48, 28
INK_THRESHOLD = 0.66  # cells from this value on are so dark (in a dark theme: so light) that they need the other ink
# Colours of the light theme: of a cell with the value 1, of numbers on cells below and above the threshold, of edges.
HEAT_COLOUR, LOW_INK, HIGH_INK, EDGE_COLOUR = "#083d68", "#0b0e12", "#ffffff", "#dfe3e8"


@dataclass(frozen=True)
class HeatMap:
    """A matrix of values in 0…1, with a name for each row and column."""

    values: Sequence[Sequence[float | None]]  # [rows, columns]; None: not measured
    rows: Sequence[str]
    columns: Sequence[str]
    framed: Sequence[str | None] = ()  # the column in which each row's cell is framed; default: that of the row's name


@dataclass(frozen=True)
class Cell:
    x: float
    y: float
    value: float | None
    framed: bool
    tooltip: str


class Canvas(Protocol):
    """Draws at positions in pixels, counted from the upper left."""

    label_width: int  # columns of text to which names are shortened

    def resize(self, width: float, height: float) -> None: ...

    def add_row_label(self, x: float, y: float, text: str) -> None:
        """Text that ends at x."""

    def add_column_label(self, x: float, y: float, text: str, is_rotated: bool) -> None:
        """Text centred at x, or rising from there by 45 degrees."""

    def add_cell(self, cell: Cell) -> None: ...


def draw_heat_map(canvas: Canvas, heat_map: HeatMap) -> None:
    rows = [truncate_middle(name, canvas.label_width) for name in heat_map.rows]
    columns = [truncate_middle(name, canvas.label_width) for name in heat_map.columns]
    longest = max(map(estimate_text_width, columns))
    is_rotated = longest > CELL_WIDTH - 2
    left = 10 + max(map(estimate_text_width, rows))
    top = 10 + (longest * 0.75 + 6 if is_rotated else 16)
    right = longest * 0.71 - CELL_WIDTH / 2 if is_rotated else 4
    canvas.resize(left + CELL_WIDTH * len(columns) + max(4, right), top + CELL_HEIGHT * len(rows) + 4)
    for j, name in enumerate(columns):
        canvas.add_column_label(left + CELL_WIDTH * (j + 0.5), top - 7, name, is_rotated)
    framed = heat_map.framed or heat_map.rows
    for i, values in enumerate(heat_map.values):
        y = top + CELL_HEIGHT * i
        canvas.add_row_label(left - 7, y + CELL_HEIGHT / 2 + 4, rows[i])
        for j, (value, column) in enumerate(zip(values, heat_map.columns, strict=True)):
            measured = "not measured" if value is None else f"{value:.3f}"
            tooltip = f"{heat_map.rows[i]}, {column}: {measured}"
            canvas.add_cell(Cell(left + CELL_WIDTH * j, y, value, framed[i] == column, tooltip))


def needs_high_ink(value: float) -> bool:
    return value >= INK_THRESHOLD


def estimate_text_width(text: str) -> float:
    """The width of a small text in pixels, rather too large than too small."""
    return sum(display_width(character) * (8.0 if character.isupper() else 6.4) for character in text)
