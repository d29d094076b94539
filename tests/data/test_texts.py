"""Held-out texts: the files that hold some, and the message for a file without any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dscl.data.texts import encode_texts, read_texts
from dscl.utils.errors import UserError


def test_lines_and_records_give_the_same_texts(tmp_path: Path) -> None:
    texts = ["a first one", "a second: \u00fc"]
    (tmp_path / "plain.txt").write_text("\n\n".join(texts) + "\n", "utf-8")
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps({"text": t, "more": 1}) for t in texts) + "\n\n")
    assert read_texts(str(tmp_path / "plain.txt"), "x") == texts
    assert read_texts(str(tmp_path / "records.jsonl"), "x") == texts


@pytest.mark.parametrize("content", ['{"txt": "a"}', '["text"]', '{"text": 3}', "text"])
def test_a_record_without_text_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"text": "good"}\n' + content)
    with pytest.raises(UserError, match=r"evaluate.heldout: .*line 2: no object like .*is needed"):
        read_texts(str(file), "evaluate.heldout")


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, complaint in (("empty.txt", "holds no text"), ("missing.txt", "cannot be read")):
        with pytest.raises(UserError, match=complaint):
            read_texts(str(tmp_path / name), "evaluate.heldout")


def test_texts_are_cut_and_those_without_a_second_token_left_out() -> None:
    def tokenizer(texts: list[str], verbose: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(map(ord, text)) for text in texts]}

    assert encode_texts(["abcdef", "a", "ab"], tokenizer, 4) == [[97, 98, 99, 100], [97, 98]]
