"""Text for a terminal: how wide it is, cut to fit, and short forms of durations and counts."""

from __future__ import annotations

import unicodedata


def cells(text: str) -> int:
    """The columns that `text` takes on a terminal, where most East Asian characters take two and accents none."""
    return sum(map(_cells, text))


def clip(text: str, width: int) -> str:
    """`text` cut at its end to `width` columns, with … for what is missing."""
    return text if cells(text) <= width else _head(text, width - 1) + "…"


def shorten(text: str, width: int) -> str:
    """`text` cut in its middle: names in a stream often differ at one end only."""
    if cells(text) <= width:
        return text
    tail = _head(text[::-1], (width - 1) // 2)[::-1]
    return _head(text, width - 1 - cells(tail)) + "…" + tail


def pad(text: str, width: int) -> str:
    """`text` with spaces after it, up to `width` columns."""
    return text + " " * (width - cells(text))


def duration(seconds: float) -> str:
    """For example 8s, 2m10s, 3h05m or 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def count(value: float) -> str:
    """For example 870, 3.4k or 1.2M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _head(text: str, width: int) -> str:
    taken = 0
    for i, character in enumerate(text):
        taken += _cells(character)
        if taken > width:
            return text[:i]
    return text
