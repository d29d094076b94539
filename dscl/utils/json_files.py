"""JSON files that hold one object, some of them with a checksum of their own content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dscl.utils.atomic_io import write_text_atomically

CHECKSUM_KEY = "checksum"


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """The object in a JSON text. ValueError for anything else, also for text that is nested too deeply."""
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError(f"it holds {type(document).__name__}, not an object")
    return document


def add_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with a checksum of its content, which `parse_checked_json` verifies."""
    return {**document, CHECKSUM_KEY: _checksum(document)}


def parse_checked_json(text: str | bytes) -> dict[str, Any]:
    """The object that `add_checksum` was given. ValueError if its content does not match its checksum."""
    document = parse_json_object(text)
    if document.pop(CHECKSUM_KEY, None) != _checksum(document):
        raise ValueError("its content does not match its checksum")
    return document


def write_checked_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace the file atomically by this document with its checksum."""
    write_text_atomically(path, json.dumps(add_checksum(document)))


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
