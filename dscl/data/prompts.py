"""Reads prompts for generation from a file or from lines of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dscl.data.records import number_records, read_bytes, read_json, read_lines, require_fields
from dscl.data.task import BadRecord, check_text
from dscl.utils.errors import UserError

PROMPT_FILES = (".txt", ".json", ".jsonl")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: .txt, one per line; .json, a list of strings or of {"prompt": ...}; .jsonl, one per line.

    Blank lines and other fields of a record are ignored.
    """
    if path.suffix not in PROMPT_FILES:
        raise UserError(f"{path}: a file of another kind; allowed: {', '.join(PROMPT_FILES)}")
    if path.suffix == ".txt":
        prompts = split_lines(read_bytes(path), str(path))
    elif path.suffix == ".jsonl":
        prompts = [_parse_prompt(record, location) for location, record in read_lines(path)]
    else:
        records = read_json(path)
        if not isinstance(records, list):
            raise UserError(f"{path}: holds a {type(records).__name__}; a list of prompts is needed")
        prompts = [_parse_prompt(record, location) for location, record in number_records(path, records)]
    if not prompts:
        raise UserError(f"{path}: holds no prompts; give at least one")
    return prompts


def split_lines(content: bytes, location: str) -> list[str]:
    """The non-blank lines of UTF-8 text, each one prompt."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{location}: not text in UTF-8; convert it") from None
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _parse_prompt(record: Any, location: str) -> str:
    try:
        if isinstance(record, BadRecord):
            raise record
        prompt = record if isinstance(record, str) else require_fields(record, ("prompt",))["prompt"]
        check_text(prompt, "the prompt")
        if not prompt.strip():
            raise BadRecord("the prompt is empty")
    except BadRecord as error:
        raise UserError(f"{location}: {error}; correct it there") from None
    return str(prompt)
