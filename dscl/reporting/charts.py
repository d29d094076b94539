"""Charts as SVG. Colours are set by CSS classes, so that they follow the page's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dscl.monitoring.heat_map import CELL_HEIGHT, CELL_WIDTH, Cell, HeatMap, draw_heat_map, needs_high_ink

NUM_COLOURS = 8
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 18, 34  # margins of a line chart


@dataclass(frozen=True)
class Size:
    """Of a line chart, in pixels. A chart scales with its place on the page; its texts and lines scale with it."""

    width: int
    height: int
    css_class: str


SMALL = Size(360, 230, "chart")
# A chart of the page's whole width is drawn twice: the page shows the wide one, or on a narrow screen the other.
NARROW, WIDE = Size(360, 230, "chart narrow"), Size(1100, 300, "chart wide")


@dataclass(frozen=True)
class Axes:
    """The vertical axis runs from 0 to `y_max`, by default to the highest point."""

    x_ticks: Sequence[tuple[float, str]]  # position and label of each
    x_label: str
    y_label: str = ""
    y_max: float | None = None
    vertical_lines: Sequence[float] = ()  # positions on the horizontal axis


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int | None = 0  # None: grey and dashed, for a reference
    faint: bool = False
    dot: tuple[float, float] | None = None  # a marked point


class SvgCanvas:
    """Collects the elements of an SVG."""

    label_width = 14

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.width = self.height = 0.0

    def resize(self, width: float, height: float) -> None:
        self.width, self.height = width, height

    def add_row_label(self, x: float, y: float, text: str) -> None:
        self.parts.append(f'<text class="tick" x="{x:.0f}" y="{y:.0f}" text-anchor="end">{escape(text)}</text>')

    def add_column_label(self, x: float, y: float, text: str, is_rotated: bool) -> None:
        placement = ' text-anchor="middle"'
        if is_rotated:
            placement = f' transform="rotate(-45 {x:.0f} {y:.0f})" text-anchor="start"'
        self.parts.append(f'<text class="tick" x="{x:.0f}" y="{y:.0f}"{placement}>{escape(text)}</text>')

    def add_cell(self, cell: Cell) -> None:
        box = f'x="{cell.x + 1:.0f}" y="{cell.y + 1:.0f}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" rx="3"'
        tooltip = f"<title>{escape(cell.tooltip)}</title>"
        if cell.value is None:
            self.parts.append(f'<g>{tooltip}<rect class="none" {box}/></g>')
            return
        ink = "high" if needs_high_ink(cell.value) else "low"
        centre = f'x="{cell.x + CELL_WIDTH / 2:.0f}" y="{cell.y + CELL_HEIGHT / 2 + 4:.0f}"'
        edge = "edge own" if cell.framed else "edge"
        self.parts.append(
            f'<g>{tooltip}<rect class="heat" {box} fill-opacity="{cell.value:.3f}"/><rect class="{edge}" {box}/>'
            f'<text class="{ink}" {centre} text-anchor="middle">{cell.value:.2f}</text></g>'
        )


def draw_heat_map_svg(title: str, heat_map: HeatMap) -> str:
    canvas = SvgCanvas()
    draw_heat_map(canvas, heat_map)
    width, height = round(canvas.width), round(canvas.height)
    return (
        f'<svg class="map" role="img" aria-label="{escape(title)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{"".join(canvas.parts)}</svg>'
    )


def draw_line_chart(title: str, lines: Sequence[Line], axes: Axes, size: Size = SMALL) -> str:
    width, height = size.width, size.height
    xs = [x for line in lines for x, _ in line.points] + [x for x, _ in axes.x_ticks] + list(axes.vertical_lines)
    x_min, x_max = min(xs), max(xs)
    y_ticks = axis_ticks(axes.y_max or max((y for line in lines for _, y in line.points), default=1.0))
    y_top = axes.y_max or y_ticks[-1]

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        fraction = (x - x_min) / (x_max - x_min) if x_max > x_min else 0.5
        return LEFT + fraction * (width - LEFT - RIGHT), height - BOTTOM - y / y_top * (height - TOP - BOTTOM)

    parts = []
    for y_tick in y_ticks:
        _, y = to_pixels(x_min, y_tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y_tick:g}</text>')
    for position in axes.vertical_lines:
        x, _ = to_pixels(position, 0)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
    for position, label in axes.x_ticks:
        x, _ = to_pixels(position, 0)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 15}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<text class="axis" x="{width - RIGHT}" y="{height - 3}" text-anchor="end">{escape(axes.x_label)}</text>'
    )
    if axes.y_label:
        parts.append(f'<text class="axis" x="{LEFT}" y="{TOP - 5}">{escape(axes.y_label)}</text>')
    for line in lines:
        parts.append(_draw_line(line, [to_pixels(*point) for point in line.points], line.dot and to_pixels(*line.dot)))
    return (
        f'<svg class="{size.css_class}" role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {height}">'
        f"{''.join(parts)}</svg>"
    )


def _draw_line(line: Line, points: Sequence[tuple[float, float]], dot: tuple[float, float] | None) -> str:
    css_class = line_style_class(line.colour) + (" faint" if line.faint else "")
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    svg = f'<polyline class="line" points="{path}"/>'
    if len(points) == 1 and dot is None:
        dot = points[0]
    if dot is not None:
        svg += f'<circle class="dot" cx="{dot[0]:.1f}" cy="{dot[1]:.1f}" r="3.5"/>'
    return f'<g class="{css_class}"><title>{escape(line.name)}</title>{svg}</g>'


def draw_legend(names: Sequence[tuple[str, int | None]]) -> str:
    """The legend of a line chart. `names`: (name, colour) of each line."""
    entries = (
        f'<li class="{line_style_class(colour)}"><svg width="26" height="10" aria-hidden="true">'
        f'<polyline class="line" points="1,5 25,5"/></svg>{escape(name)}</li>'
        for name, colour in names
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def line_style_class(colour: int | None) -> str:
    """The CSS classes of a line. Lines beyond the number of colours repeat them with another dash pattern."""
    return "other" if colour is None else f"c{colour % NUM_COLOURS} d{colour // NUM_COLOURS % 3}"


def axis_ticks(maximum: float) -> list[float]:
    """At most six round numbers from 0 to `maximum` or just above it."""
    if not maximum > 0:
        return [0.0, 1.0]
    magnitude = 10.0 ** math.floor(math.log10(maximum / 5))
    factors = (1, 2, 2.5, 5, 10)
    step = next(magnitude * factor for factor in factors if magnitude * factor * 5 >= maximum * (1 - 1e-9))
    return [round(step * i, 12) for i in range(math.ceil(maximum / step * (1 - 1e-9)) + 1)]
