"""Prompts of a file: every allowed kind of file, and the message for others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from dscl.data.prompts import read_prompts
from dscl.utils.errors import UserError


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\n \t\n  two \r\nthree", ["one", "  two ", "three"]),
        ("a.txt", "\ufeffone\n", ["one"]),
        ("a.json", '["one", {"prompt": "two\\nlines", "answer": "x"}]', ["one", "two\nlines"]),
        ("a.jsonl", '{"prompt": "one"}\n\n"two"\n', ["one", "two"]),
    ],
)
def test_prompts_of_a_file(name: str, content: str, expected: Iterable[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, "utf-8", newline="")
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"one", "a file of another kind; allowed: .txt, .json, .jsonl"),
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.txt", b"\xff\xfe", "not text in UTF-8"),
        ("a.json", b"{}", "holds a dict; a list of prompts is needed"),
        ("a.json", b"[]", "holds no prompts"),
        ("a.json", b'["a", ""]', "a.json, record 2: the prompt is empty"),
        ("a.json", b'[{"sentence": "x"}]', "record 1: the field 'prompt' is missing \\(its fields: sentence\\)"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": 3}', "a.jsonl, line 2: the prompt is of type int; text is needed"),
        ("a.jsonl", b'{"prompt"', "line 1: broken JSON"),
        ("none.txt", None, "none.txt: cannot be read \\(No such file"),
    ],
)
def test_files_without_prompts_are_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)
