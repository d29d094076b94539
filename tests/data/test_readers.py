"""Each layout of files, and the samples that its records become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dscl.data.task import Task
from dscl.utils.errors import UserError

Write = Callable[[str, Any], Path]
Read = Callable[..., Task]


def pairs(samples: Any) -> set[tuple[str, str]]:
    return {(sample.prompt, sample.answer) for sample in samples}


def records(prefix: str, count: int, prompt: str = "prompt", answer: str = "answer") -> list[dict[str, str]]:
    return [{prompt: f"{prefix} {i}", answer: "ab"[i % 2]} for i in range(count)]


def test_trace(write: Write, read: Read) -> None:
    for split in ("train", "eval", "test"):
        folder = write(f"task/{split}.json", records(split, 3)).parent
    task = read(folder)
    assert pairs(task.train) == {("train 0", "a"), ("train 1", "b"), ("train 2", "a")}
    assert {sample.prompt for sample in task.dev} == {"eval 0", "eval 1", "eval 2"}
    assert {sample.prompt for sample in task.test} == {"test 0", "test 1", "test 2"}
    assert (task.labels, task.metric) == (None, "rouge_l")
    assert {sample.source for sample in task.test} == {f"{folder}/test.json, record {i}" for i in (1, 2, 3)}
    assert (read(folder, labels=["a", "b"]).metric, read(folder, metric="exact_match").metric) == (
        "accuracy",
        "exact_match",
    )


def write_cl_folder(write: Write, **splits: Any) -> Path:
    for split, content in splits.items():
        write(f"task/{split}.json", content)
    return write("task/labels.json", ["b", "a"]).parent


def test_cl_benchmark(write: Write, read: Read) -> None:
    train, test = records("train", 20, "sentence", "label"), records("test", 6, "sentence", "label")
    task = read(write_cl_folder(write, train=train, test=test))
    assert (task.labels, task.metric) == (("b", "a"), "accuracy")
    assert pairs(task.test) == {(f"{r['sentence']}\nAnswer:", r["label"]) for r in test}
    assert pairs(task.train) | pairs(task.dev) == {(f"{r['sentence']}\nAnswer:", r["label"]) for r in train}
    own = read(write_cl_folder(write, train=train, test=test), template="{labels}? {sentence}")
    assert {sample.prompt for sample in own.test} == {f"b, a? {r['sentence']}" for r in test}


def test_a_dev_split_that_copies_the_test_split_is_not_used(write: Write, read: Read) -> None:
    train, test = records("train", 20, "sentence", "label"), records("test", 6, "sentence", "label")
    copied = read(write_cl_folder(write, train=train, test=test, dev=test[::-1]))
    assert {sample.prompt[:5] for sample in copied.dev} == {"train"}
    own = read(write_cl_folder(write, train=train, test=test, dev=records("dev", 6, "sentence", "label")))
    assert {sample.prompt[:3] for sample in own.dev} == {"dev"}
    assert len(own.train) == 20


def test_cl_benchmark_needs_labels(write: Write, read: Read) -> None:
    write("task/test.json", records("test", 2, "sentence", "label"))
    folder = write("task/train.json", records("train", 9, "sentence", "label")).parent
    with pytest.raises(UserError, match=r"there is no labels\.json"):
        read(folder)
    assert read(folder, labels=["a", "b"]).labels == ("a", "b")


def superni_document(name: str, count: int) -> dict[str, Any]:
    return {
        "Definition": [f"Do {name}."],
        "Positive Examples": [{"input": "never", "output": "used", "explanation": ""}],
        "Instances": [{"input": f"{name} {i}", "output": [f"first {i}", f"second {i}"]} for i in range(count)],
    }


def test_superni_with_splits(write: Write, read: Read) -> None:
    for split in ("train", "dev", "test"):
        folder = write(f"task/{split}.json", superni_document(split, 2)).parent
    task = read(folder)
    assert {sample.prompt for sample in task.test} == {f"Do test.\n\nInput: test {i}\nOutput:" for i in (0, 1)}
    by_source = {sample.source: sample for sample in task.train}
    assert by_source[f"{folder}/train.json, instance 2"].references == ("first 1", "second 1")
    assert by_source[f"{folder}/train.json, instance 2"].answer == "first 1"
    assert {s.prompt for s in read(folder, template="{input}|{definition}").dev} == {
        "dev 0|Do dev.",
        "dev 1|Do dev.",
    }


def test_superni_file_and_folder_are_divided(write: Write, read: Read) -> None:
    write("task/one.json", superni_document("one", 30))
    folder = write("task/two.json", superni_document("two", 20)).parent
    for path, count in ((folder / "one.json", 30), (folder, 50)):
        task = read(path)
        sizes = (len(task.train), len(task.dev), len(task.test))
        assert sizes == (count * 8 // 10, count // 10, count // 10)
        assert len(pairs(task.train) | pairs(task.dev) | pairs(task.test)) == count


@pytest.mark.parametrize("missing_key", ["Definition", "Instances"])
def test_a_superni_file_needs_both_parts(write: Write, read: Read, missing_key: str) -> None:
    content = superni_document("x", 9)
    del content[missing_key]
    with pytest.raises(UserError, match="not a SuperNI task"):
        read(write("task.json", content), format="superni")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Definition": 3}, "Definition is of type int"),
        ({"Instances": {}}, "Instances is a dict"),
        ({"Instances": [{"input": "x", "output": []}]}, "instance 1: the output is empty"),
        ({"Instances": [{"input": "x", "output": ["fine", ""]}]}, "instance 1: the answer is empty"),
    ],
)
def test_broken_superni(write: Write, read: Read, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write("task.json", {**superni_document("x", 9), **change}))


def test_jsonl_folder_file_and_columns(write: Write, read: Read) -> None:
    write("task/test.jsonl", records("test", 2, "prompt", "completion"))
    write("task/validation.jsonl", records("dev", 2, "prompt", "completion"))
    folder = write("task/train.jsonl", records("train", 4, "prompt", "completion")).parent
    task = read(folder)
    assert [len(task.train), len(task.dev), len(task.test)] == [4, 2, 2]
    assert pairs(task.dev) == {("dev 0", "a"), ("dev 1", "b")}
    divided = read(write("one.jsonl", records("all", 20)))
    assert [len(divided.train), len(divided.dev), len(divided.test)] == [16, 2, 2]
    named = read(write("named.jsonl", records("all", 20, "q", "r")), columns={"prompt": "q", "answer": "r"})
    assert pairs(named.train) <= {(f"all {i}", "ab"[i % 2]) for i in range(20)}


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_chat_messages(write: Write, read: Read) -> None:
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "yes?"), ("user", "bye"), ("assistant", "ciao")]
    others = [conversation(("user", f"hi {i}"), ("assistant", "yes?")) for i in range(10)]
    path = write("chat.jsonl", [conversation(*turns)] * 3 + others)
    longest = max(read(path).train, key=lambda sample: len(sample.messages or ()))
    assert longest.messages is not None
    assert [(m["role"], m["content"]) for m in longest.messages] == turns
    assert (longest.answer, longest.references) == ("ciao", ("ciao",))
    with pytest.raises(UserError, match="template cannot be applied to chat messages"):
        read(path, template="{prompt}")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (conversation(("user", "hi")), "two or more messages"),
        (conversation(("assistant", "hi"), ("user", "hi")), "the last message is the user's"),
        (conversation(("bot", "hi"), ("assistant", "hi")), "message 1 has a role that is not known; allowed: "),
        (conversation(("user", "hi"), ("assistant", " ")), "the answer is empty"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "'content' is missing"),
    ],
)
def test_bad_conversations(write: Write, read: Read, record: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"line 1: .*{message}"):
        read(write("chat.jsonl", [record]))


def test_missing_and_doubled_splits(write: Write, read: Read) -> None:
    folder = write("task/train.json", records("train", 3)).parent
    with pytest.raises(UserError, match=r"no test split; expected a file test\.json"):
        read(folder)
    write("task/test.json", records("test", 3))
    write("task/dev.json", records("dev", 3))
    write("task/eval.json", records("eval", 3))
    with pytest.raises(UserError, match=r"dev\.json and eval\.json would both be the dev split"):
        read(folder)
