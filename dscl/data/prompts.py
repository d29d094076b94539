"""Prompts to answer, from a file or a stream of lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dscl.data.records import fields_of, numbered, read_bytes, read_json, read_lines
from dscl.data.task import BadRecord, check_text
from dscl.utils.errors import UserError

PROMPT_FILES = (".txt", ".json", ".jsonl")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: .txt, one a line; .json, a list of texts or of {"prompt": ...}; .jsonl, such a one a line.

    Lines that are blank are left out; what else stands in a record is of no concern.
    """
    if path.suffix not in PROMPT_FILES:
        raise UserError(f"{path}: a file of another kind; allowed: {', '.join(PROMPT_FILES)}")
    if path.suffix == ".txt":
        prompts = split_lines(read_bytes(path), str(path))
    elif path.suffix == ".jsonl":
        prompts = [_prompt(record, where) for where, record in read_lines(path)]
    else:
        records = read_json(path)
        if not isinstance(records, list):
            raise UserError(f"{path}: holds a {type(records).__name__}; a list of prompts is needed")
        prompts = [_prompt(record, where) for where, record in numbered(path, records)]
    if not prompts:
        raise UserError(f"{path}: holds no prompts; give at least one")
    return prompts


def split_lines(content: bytes, where: str) -> list[str]:
    """One prompt a line; those that are blank are left out."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where}: not text in UTF-8; convert it") from None
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _prompt(record: Any, where: str) -> str:
    try:
        if isinstance(record, BadRecord):
            raise record
        prompt = record if isinstance(record, str) else fields_of(record, ("prompt",))["prompt"]
        check_text(prompt, "the prompt")
        if not prompt.strip():
            raise BadRecord("the prompt is empty")
    except BadRecord as error:
        raise UserError(f"{where}: {error}; correct it there") from None
    return str(prompt)
