"""Plain texts from a file, for measurements on running text, such as the held-out loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dscl.utils.errors import UserError


def read_texts(path: str, setting: str) -> list[str]:
    """The non-empty texts of a `.jsonl` file (one object with `text` per line), or the lines of any other file."""
    file = Path(path).expanduser()
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {path} cannot be read ({error}); give a text or .jsonl file in UTF-8") from None
    if file.suffix == ".jsonl":
        lines = [_parse_text(line, f"{setting}: {path}: line {number}") for number, line in enumerate(lines, 1)]
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UserError(f"{setting}: {path} holds no text; give a file with at least one")
    return texts


def encode_texts(texts: list[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Tokenize texts with special tokens and truncate them to `max_length`; texts of a single token are left out."""
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    return [ids[:max_length] for ids in encoded if len(ids) > 1]


def _parse_text(line: str, location: str) -> str:
    if not line.strip():
        return ""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{location}: no object like {{"text": "..."}}, which is needed')
    return text
