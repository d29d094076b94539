"""Charts as SVG. Colours come from the page's style by class, so that they follow its light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dscl.utils.formatting import cells, shorten

COLOURS = 8
NAME = 14  # columns of a name beside a chart
CELL = (48, 28)
TURNS = 0.66  # from this value on a cell is dark enough (in the dark: light enough) for the other ink
WIDTH, BROAD, HEIGHT = 360, 680, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 34


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]
    colour: int | None = 0  # None: grey and dashed, for what is only compared with
    faint: bool = False
    dot: tuple[float, float] | None = None


def heat_map(
    title: str,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> str:
    """A cell for each value in 0…1; those whose row and column have one name are framed."""
    short = [shorten(name, NAME) for name in columns]
    longest = max(map(_wide, short))
    upright = longest > CELL[0] - 2
    left = 10 + max(_wide(shorten(name, NAME)) for name in rows)
    top = 10 + (longest * 0.75 + 6 if upright else 16)
    width = left + CELL[0] * len(columns) + (longest * 0.71 - CELL[0] / 2 if upright else 4)
    height = top + CELL[1] * len(rows) + 4
    parts = []
    for j, name in enumerate(short):
        x, y = left + CELL[0] * (j + 0.5), top - 7
        turned = f' transform="rotate(-45 {x:.0f} {y:.0f})" text-anchor="start"' if upright else ' text-anchor="middle"'
        parts.append(f'<text class="tick" x="{x:.0f}" y="{y:.0f}"{turned}>{escape(name)}</text>')
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = top + CELL[1] * i
        parts.append(
            f'<text class="tick" x="{left - 7:.0f}" y="{y + CELL[1] / 2 + 4:.0f}" text-anchor="end">'
            f"{escape(shorten(name, NAME))}</text>"
        )
        for j, (value, column) in enumerate(zip(row, columns, strict=True)):
            told = f"{name}, {column}: {'not measured' if value is None else f'{value:.3f}'}"
            parts.append(_cell(left + CELL[0] * j, y, value, told, framed=name == column))
    return (
        f'<svg class="map" role="img" aria-label="{escape(title)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>'
    )


def _wide(text: str) -> float:
    """About as many pixels as a small text takes, rather too many than too few."""
    return sum(cells(character) * (8.0 if character.isupper() else 6.4) for character in text)


def _cell(x: float, y: float, value: float | None, told: str, framed: bool) -> str:
    box = f'x="{x + 1:.0f}" y="{y + 1:.0f}" width="{CELL[0] - 2}" height="{CELL[1] - 2}" rx="3"'
    if value is None:
        return f'<g><title>{escape(told)}</title><rect class="none" {box}/></g>'
    ink = "high" if value >= TURNS else "low"
    middle = f'x="{x + CELL[0] / 2:.0f}" y="{y + CELL[1] / 2 + 4:.0f}"'
    edge = "edge own" if framed else "edge"
    return (
        f'<g><title>{escape(told)}</title><rect class="heat" {box} fill-opacity="{value:.3f}"/>'
        f'<rect class="{edge}" {box}/><text class="{ink}" {middle} text-anchor="middle">{value:.2f}</text></g>'
    )


def line_chart(
    title: str,
    lines: Sequence[Line],
    under: Sequence[tuple[float, str]],
    across: str,
    top: float | None = None,
    unit: str = "",
    marks: Sequence[float] = (),
    width: int = WIDTH,
) -> str:
    """Lines over 0…`top` (default: the highest point); `under` are the ticks below, `marks` upright lines."""
    xs = [x for line in lines for x, _ in line.points] + [x for x, _ in under] + list(marks)
    low, high = min(xs), max(xs)
    steps = ticks(top or max((y for line in lines for _, y in line.points), default=1.0))
    most = top or steps[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        share = (x - low) / (high - low) if high > low else 0.5
        return LEFT + share * (width - LEFT - RIGHT), HEIGHT - BOTTOM - y / most * (HEIGHT - TOP - BOTTOM)

    parts = []
    for step in steps:
        _, y = at(low, step)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{step:g}</text>')
    for mark in marks:
        x, _ = at(mark, 0)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for x, name in under:
        place, _ = at(x, 0)
        parts.append(
            f'<text class="tick" x="{place:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{name}</text>'
        )
    parts.append(f'<text class="axis" x="{width - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(across)}</text>')
    if unit:
        parts.append(f'<text class="axis" x="{LEFT + 4}" y="{TOP + 4}">{escape(unit)}</text>')
    for line in lines:
        parts.append(_line(line, [at(*point) for point in line.points], line.dot and at(*line.dot)))
    kind = "chart broad" if width > WIDTH else "chart"
    return (
        f'<svg class="{kind}" role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {HEIGHT}">'
        f"{''.join(parts)}</svg>"
    )


def _line(line: Line, points: Sequence[tuple[float, float]], dot: tuple[float, float] | None) -> str:
    kind = colour_class(line.colour) + (" faint" if line.faint else "")
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn = f'<polyline class="line" points="{path}"/>'
    if len(points) == 1 and dot is None:
        dot = points[0]
    if dot is not None:
        drawn += f'<circle class="dot" cx="{dot[0]:.1f}" cy="{dot[1]:.1f}" r="3.5"/>'
    return f'<g class="{kind}"><title>{escape(line.name)}</title>{drawn}</g>'


def legend(names: Sequence[tuple[str, int | None]]) -> str:
    """The names of the lines, each beside a stretch of its line."""
    entries = (
        f'<li class="{colour_class(colour)}"><svg width="26" height="10" aria-hidden="true">'
        f'<polyline class="line" points="1,5 25,5"/></svg>{escape(name)}</li>'
        for name, colour in names
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def colour_class(colour: int | None) -> str:
    """Beyond the colours that can be told apart, lines are also dashed, each round in its own way."""
    return "other" if colour is None else f"c{colour % COLOURS} d{colour // COLOURS % 3}"


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to `most` or just above it, at most six."""
    if not most > 0:
        return [0.0, 1.0]
    size = 10.0 ** math.floor(math.log10(most / 5))
    step = next(size * of for of in (1, 2, 2.5, 5, 10) if size * of * 5 >= most * (1 - 1e-9))
    return [round(step * i, 12) for i in range(math.ceil(most / step * (1 - 1e-9)) + 1)]
