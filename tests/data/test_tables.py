"""Tables through `datasets`: local files, folders and saved data sets, with a column mapping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from dscl.data.task import Task
from dscl.utils.errors import UserError

Write = Callable[[str, Any], Path]
Read = Callable[..., Task]


def csv(prefix: str, count: int) -> str:
    return "context,question,gold\n" + "".join(f"{prefix} {i},{i},{'yn'[i % 2]}\n" for i in range(count))


def test_csv_folder_with_columns_and_template(write: Write, read: Read) -> None:
    write("task/train.csv", csv("train", 10))
    folder = write("task/test.csv", csv("test", 4)).parent
    task = read(folder, columns={"prompt": "context", "answer": "gold"})
    assert {(s.prompt, s.answer) for s in task.test} == {(f"test {i}", "yn"[i % 2]) for i in range(4)}
    assert (len(task.train), len(task.dev)) == (9, 1)
    templated = read(folder, columns={"answer": "gold"}, template="{context}? {question}")
    assert {s.prompt for s in templated.test} == {f"test {i}? {i}" for i in range(4)}
    assert {s.source for s in task.test} == {f"{folder} (test), row {i}" for i in range(1, 5)}


def test_one_file_is_divided(write: Write, read: Read) -> None:
    task = read(write("all.csv", csv("all", 20)), columns={"prompt": "context", "answer": "gold"})
    assert [len(task.train), len(task.dev), len(task.test)] == [16, 2, 2]


def test_class_labels_become_names(tmp_path: Path, read: Read) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": [f"row {i}" for i in range(10)], "label": [i % 2 for i in range(10)]}
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(rows, features=features),
        test=datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features=features),
    )
    splits.save_to_disk(str(tmp_path / "saved"))
    settings = {"columns": {"prompt": "text", "answer": "label"}}
    with pytest.raises(UserError, match=r"\(test\), row 2: it has no label"):
        read(tmp_path / "saved", **settings)
    task = read(tmp_path / "saved", bad_records="skip", **settings)
    assert (task.labels, task.metric) == (("no", "yes"), "accuracy")
    assert [(s.prompt, s.answer) for s in task.test] == [("x", "yes")]


def test_chat_and_lists_of_answers(tmp_path: Path, read: Read) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    chats = [[{**turns[0], "content": f"hi {i}"}, turns[1]] for i in range(10)]
    datasets.Dataset.from_dict({"messages": chats}).save_to_disk(str(tmp_path / "chat"))
    assert read(tmp_path / "chat").train[0].answer == "yo"
    answers = {"prompt": [f"p {i}" for i in range(9)], "answer": [["one", "two"]] * 9}
    datasets.Dataset.from_dict(answers).to_parquet(str(tmp_path / "lists.parquet"))
    assert read(tmp_path / "lists.parquet").train[0].references == ("one", "two")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no column 'answer'; its columns are context, question, gold"),
        ({"columns": {"prompt": "ctx", "answer": "gold"}}, "no column 'ctx'"),
        ({"columns": {"question": "context"}}, "columns.question: no such key"),
        ({"columns": {"answer": "gold"}, "template": "{contxt}"}, "did you mean 'context'"),
    ],
)
def test_columns_that_are_not_there(write: Write, read: Read, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write("all.csv", csv("all", 20)), **settings)


def test_a_file_that_cannot_be_read(write: Write, read: Read) -> None:
    with pytest.raises(UserError, match=r"datasets\.load_dataset cannot read it"):
        read(write("all.parquet", b"not a table"))
