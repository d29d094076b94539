"""The layout of a task is detected from its files; unknown content is described."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dscl.data.formats import detect_layout
from dscl.data.task import Task
from dscl.utils.errors import UserError

Write = Callable[[str, Any], Path]
Read = Callable[..., Task]


@pytest.mark.parametrize(
    ("layout", "file", "content"),
    [
        ("trace", "train.json", [{"prompt": "p", "answer": "a"}]),
        ("trace", "train.json", [3, {"prompt": "p"}, {"prompt": "p", "answer": "a"}]),
        ("cl_benchmark", "train.json", [{"label": "l", "sentence": "s"}]),
        ("superni", "train.json", {"Definition": "d", "Instances": []}),
        ("superni", "task001.json", {"Definition": "d", "Instances": []}),
        ("jsonl", "train.jsonl", "anything"),
        ("datasets", "deep/train.csv", "prompt,answer"),
        ("datasets", "dataset_dict.json", "{}"),
    ],
)
def test_folders(write: Write, tmp_path: Path, layout: str, file: str, content: Any) -> None:
    write(f"task/{file}", content)
    assert detect_layout(tmp_path / "task") == layout


@pytest.mark.parametrize(
    ("layout", "file", "content"),
    [
        ("superni", "x.json", {"Definition": "d", "Instances": []}),
        ("jsonl", "x.jsonl", ""),
        ("datasets", "x.parquet", ""),
    ],
)
def test_files(write: Write, layout: str, file: str, content: Any) -> None:
    assert detect_layout(write(file, content)) == layout


@pytest.mark.parametrize(
    ("file", "content", "description"),
    [
        ("task/train.json", [{"text": "t", "gold": "g"}], "train.json, a list of dict with the fields text, gold"),
        ("task/train.json", {"a": 1}, "train.json, a dict of dict with the fields a"),
        ("task/notes.txt", "hello", "notes.txt"),
    ],
)
def test_unknown_content_is_described(write: Write, file: str, content: Any, description: str) -> None:
    with pytest.raises(UserError, match=f"no known layout; found {description}; known are trace"):
        detect_layout(write(file, content).parent)


def test_missing_path_and_settings_that_do_not_apply(write: Write, read: Read) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such file or folder; .*format: datasets"):
        read("nowhere")
    write("task/test.json", [{"prompt": "p", "answer": "a"}])
    folder = write("task/train.json", [{"prompt": "p", "answer": "a"}] * 9).parent
    with pytest.raises(UserError, match="columns does not apply to format trace"):
        read(folder, columns={"prompt": "p"})
    with pytest.raises(UserError, match="format trace needs a folder"):
        read(folder / "train.json", format="trace")
    with pytest.raises(UserError, match="the field 'sentence' is missing"):
        read(folder, format="cl_benchmark", labels=["a"])
