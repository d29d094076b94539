"""The score matrix as a picture: a cell for each score, coloured by it, with the task names on both axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dscl.maths.scores import Row
from dscl.methods.base import Matrix
from dscl.utils.formatting import shorten

CELL = (68, 40)
MARGIN = 16
LABEL_CHARACTERS = 26
INK, MUTED, UNMEASURED, GROUND = (25, 25, 25), (120, 120, 120), (236, 236, 236), (255, 255, 255)

# Dark to light in even steps of brightness, so that it also reads in grey and to colour-blind eyes.
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)


def score_picture(document: Mapping[str, Any]) -> np.ndarray:
    """An RGB picture, [height, width, 3] uint8, of a scores document; its size depends on the task names alone."""
    names = [shorten(name, LABEL_CHARACTERS) for name in document["tasks"]]
    before = document.get("before")
    rows = [before or [None] * len(names), *document["matrix"]]
    rows += [[None] * len(names)] * (len(names) + 1 - len(rows))
    return _picture(names, ["before training", *(f"after {name}" for name in names)], rows, marked=-1)


def share_picture(matrix: Matrix) -> np.ndarray:
    """The same of shares, a row and a column for each task."""
    names = [shorten(name, LABEL_CHARACTERS) for name in matrix.tasks]
    return _picture(names, names, matrix.values, marked=0)


def routing_picture(document: Mapping[str, Any]) -> np.ndarray:
    """Whose prompts (rows) were answered by whom (columns), as shares."""
    found = document["confusion"]
    by = ["nobody" if name is None else shorten(name, LABEL_CHARACTERS) for name in found["answered_by"]]
    return _picture(by, [shorten(name, LABEL_CHARACTERS) for name in found["tasks"]], found["shares"], marked=0)


def _picture(names: Sequence[str], labels: Sequence[str], rows: Sequence[Row], marked: int) -> np.ndarray:
    """A cell for each number; those on the diagonal (by so many rows above) are framed."""
    font = ImageFont.load_default(15)
    left = MARGIN + 10 + max(_width(font, label) for label in labels)
    longest = max(_width(font, name) for name in names)
    upright = longest > CELL[0] - 6
    top = MARGIN + 10 + (longest if upright else 18)
    size = (left + CELL[0] * len(names) + MARGIN, top + CELL[1] * len(rows) + MARGIN)
    image = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(image)

    for j, name in enumerate(names):
        centre = left + CELL[0] * j + CELL[0] // 2
        if upright:
            _write_upright(image, name, font, centre, top - 8)
        else:
            draw.text((centre, top - 8), name, INK, font, anchor="ms")
    for i, (label, row) in enumerate(zip(labels, rows, strict=True)):
        y = top + CELL[1] * i
        draw.text((left - 8, y + CELL[1] // 2), label, INK, font, anchor="rm")
        for j, score in enumerate(row):
            _cell(draw, font, (left + CELL[0] * j, y), score, framed=i + marked == j)
    return np.asarray(image)


def _cell(draw: ImageDraw.ImageDraw, font: Any, corner: tuple[int, int], score: float | None, framed: bool) -> None:
    x, y = corner
    box = (x + 1, y + 1, x + CELL[0] - 2, y + CELL[1] - 2)
    fill = UNMEASURED if score is None else _colour(score)
    draw.rectangle(box, fill=fill, outline=INK if framed else None, width=2)
    text = "-" if score is None else f"{score:.3f}"
    bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140
    ink = MUTED if score is None else INK if bright else GROUND
    draw.text((x + CELL[0] // 2, y + CELL[1] // 2), text, ink, font, anchor="mm")


def _colour(score: float) -> tuple[int, int, int]:
    place = min(max(score, 0.0), 1.0) * (len(_COLOURS) - 1)
    low = min(int(place), len(_COLOURS) - 2)
    r, g, b = _COLOURS[low] + (place - low) * (_COLOURS[low + 1] - _COLOURS[low])
    return round(r), round(g), round(b)


def _write_upright(image: Image.Image, text: str, font: Any, centre: int, bottom: int) -> None:
    """Write `text` from the bottom up, ending its line at `centre` from the left."""
    strip = Image.new("RGB", (_width(font, text), 20), GROUND)
    ImageDraw.Draw(strip).text((0, 10), text, INK, font, anchor="lm")
    turned = strip.rotate(90, expand=True)
    image.paste(turned, (centre - turned.width // 2, bottom - turned.height))


def _width(font: Any, text: str) -> int:
    return int(font.getlength(text)) + 1
