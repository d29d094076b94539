"""Every kind of bad record: named with its file and number, or skipped and counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dscl.data.task import Task
from dscl.utils.errors import UserError

Write = Callable[[str, Any], Path]
Read = Callable[..., Task]
GOOD = [{"prompt": f"question {i}", "answer": "yes"} for i in range(4)]
BAD_VALUES = [
    ({"prompt": "q"}, "the field 'answer' is missing"),
    ({"prompt": "q", "answer": 7}, "the answer is of type int"),
    ({"prompt": None, "answer": "yes"}, "prompt is of type NoneType"),
    ({"prompt": "q", "answer": " \n"}, "the answer is empty"),
    ("just text", "it is a str"),
]


def trace_folder(write: Write, train: Any) -> Path:
    write("task/eval.json", [{"prompt": f"dev question {i}", "answer": "yes"} for i in range(4)])
    write("task/test.json", GOOD)
    return write("task/train.json", train).parent


@pytest.mark.parametrize(("record", "message"), BAD_VALUES)
def test_a_bad_record_stops_with_its_place(write: Write, read: Read, record: Any, message: str) -> None:
    folder = trace_folder(write, [*GOOD, record, *GOOD])
    with pytest.raises(UserError, match=rf"task/train\.json, record 5: .*{message}.*data.bad_records=skip"):
        read(folder)


@pytest.mark.parametrize(("record", "message"), BAD_VALUES)
def test_bad_records_are_skipped_and_counted(
    write: Write, read: Read, caplog: pytest.LogCaptureFixture, record: Any, message: str
) -> None:
    folder = trace_folder(write, [*GOOD, record, *GOOD, record])
    with caplog.at_level(logging.WARNING, logger="dscl"):
        assert len(read(folder, bad_records="skip").train) == 8
    (line,) = caplog.messages
    assert f"skipped 2 of 10 records of {folder / 'train.json'}; first: " in line
    assert "record 5: " in line


def test_good_records_leave_no_warning(write: Write, read: Read, caplog: pytest.LogCaptureFixture) -> None:
    task = read(trace_folder(write, GOOD), bad_records="skip")
    assert len(task.train) == 4
    assert not caplog.messages


def test_label_outside_the_label_set(write: Write, read: Read) -> None:
    write("task/labels.json", ["yes", "no"])
    write("task/test.json", [{"sentence": "s", "label": "yes"}])
    folder = write("task/train.json", [{"sentence": "s", "label": "yes"}, {"sentence": "s", "label": "maybe"}]).parent
    with pytest.raises(UserError, match="record 2: the answer is not in the label set"):
        read(folder)


def test_bad_bytes_in_one_record_of_a_json_file(write: Write, read: Read) -> None:
    folder = trace_folder(write, json.dumps([*GOOD, {"prompt": "X", "answer": "yes"}]).encode().replace(b"X", b"\xff"))
    with pytest.raises(UserError, match=r"record 5: prompt is not valid UTF-8"):
        read(folder)
    assert len(read(folder, bad_records="skip").train) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "q", "answer": ', "broken JSON"),
        (b'{"prompt": "\xe9t\xe9", "answer": "yes"}', "prompt is not valid UTF-8"),
        (b'[["prompt", "q"]]', "it is a list"),
        (b'{"prompt": "q"}', "'completion' is missing"),
    ],
)
def test_bad_lines(write: Write, read: Read, line: bytes, message: str) -> None:
    lines = [json.dumps(record).encode() for record in GOOD]
    path = write("task.jsonl", b"\n".join([*lines, b"", line, *lines]))
    with pytest.raises(UserError, match=rf"task\.jsonl, line 6: .*{message}"):
        read(path)
    task = read(path, bad_records="skip")
    assert len(task.train) + len(task.dev) + len(task.test) == 8


def test_broken_json_file(write: Write, read: Read) -> None:
    for mode in ("stop", "skip"):
        with pytest.raises(UserError, match=r"train\.json: broken JSON .*line 1"):
            read(trace_folder(write, '[{"prompt": "q"'), bad_records=mode)


def test_unicode_survives(write: Write, read: Read) -> None:
    text = "Grüße, 漢字 \u2028 \U0001f600 \u00a0"
    record, other = ({"prompt": prompt, "completion": text + "!"} for prompt in (text, text + "?"))
    write("task/test.jsonl", [record])
    write("task/dev.jsonl", [other])
    task = read(write("task/train.jsonl", b"\xef\xbb\xbf" + json.dumps(record, ensure_ascii=False).encode()).parent)
    for split, prompt in ((task.train, text), (task.dev, text + "?"), (task.test, text)):
        assert [(sample.prompt, sample.answer) for sample in split] == [(prompt, text + "!")]
