"""JSON files with a checksum of their content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dscl.utils.json_files import parse_checked_json, parse_json_object, write_checked_json

DOCUMENT = {"files": {"a": {"bytes": 3, "crc32": 7}}, "text": "情感"}


def test_a_document_comes_back_as_it_was(tmp_path: Path) -> None:
    write_checked_json(tmp_path / "a.json", DOCUMENT)
    assert parse_checked_json((tmp_path / "a.json").read_bytes()) == DOCUMENT


def test_a_changed_document_is_refused(tmp_path: Path) -> None:
    write_checked_json(tmp_path / "a.json", DOCUMENT)
    text = (tmp_path / "a.json").read_text()
    for change in (text.replace("7", "8"), text.replace('"text"', '"next"'), text.replace('"checksum"', '"c"')):
        assert change != text
        with pytest.raises(ValueError, match="does not match its checksum"):
            parse_checked_json(change)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"a"', "[" * 100_000, "{", "", "\xff"])
def test_anything_but_an_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json_object(text)
    with pytest.raises(ValueError, match=r"\w"):
        parse_checked_json(text)
    assert parse_json_object(json.dumps(DOCUMENT)) == DOCUMENT
