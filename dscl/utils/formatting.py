"""Text for a terminal: its display width, truncation, and short forms of durations and counts."""

from __future__ import annotations

import unicodedata


def display_width(text: str) -> int:
    """How many columns `text` takes on a terminal: wide East Asian characters take two, combining accents none."""
    return sum(map(_character_width, text))


def truncate_end(text: str, width: int) -> str:
    """`text` cut at its end to `width` columns; … replaces the part that is cut off."""
    return text if display_width(text) <= width else _fitting_prefix(text, width - 1) + "…"


def truncate_middle(text: str, width: int) -> str:
    """`text` cut in its middle to `width` columns, because names in a stream often differ only at one end."""
    if display_width(text) <= width:
        return text
    tail = _fitting_prefix(text[::-1], (width - 1) // 2)[::-1]
    return _fitting_prefix(text, width - 1 - display_width(tail)) + "…" + tail


def pad_to_width(text: str, width: int) -> str:
    """`text` followed by spaces up to `width` columns."""
    return text + " " * (width - display_width(text))


def format_duration(seconds: float) -> str:
    """A duration as text, for example 8s, 2m10s, 3h05m or 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_count(value: float) -> str:
    """A count as text, for example 870, 3.4k or 1.2M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def _character_width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fitting_prefix(text: str, width: int) -> str:
    """The longest prefix of `text` that fits into `width` columns."""
    columns = 0
    for i, character in enumerate(text):
        columns += _character_width(character)
        if columns > width:
            return text[:i]
    return text
