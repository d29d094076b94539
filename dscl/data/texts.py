"""Plain texts from a file, for what is measured on running text instead of on a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dscl.utils.errors import UserError


def read_texts(path: str, setting: str) -> list[str]:
    """Texts of a `.jsonl` file (an object with `text` a line), or the lines of any other; empty ones do not count."""
    file = Path(path).expanduser()
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {path} cannot be read ({error}); give a text or .jsonl file in UTF-8") from None
    if file.suffix == ".jsonl":
        lines = [_text(line, f"{setting}: {path}: line {number}") for number, line in enumerate(lines, 1)]
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UserError(f"{setting}: {path} holds no text; give a file with at least one")
    return texts


def encode_texts(texts: list[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Token ids, each text with what the tokenizer puts before it, cut at `max_length`; those of one token left out."""
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    return [ids[:max_length] for ids in encoded if len(ids) > 1]


def _text(line: str, place: str) -> str:
    if not line.strip():
        return ""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{place}: no object like {{"text": "..."}}, which is needed')
    return text
