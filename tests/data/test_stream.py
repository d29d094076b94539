"""Splits, limits and seeds of a stream, and streams that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dscl.config.parsing import parse_config
from dscl.data.stream import load_stream
from dscl.data.task import DataConfig, Sample, Task, TaskConfig
from dscl.utils.errors import UserError

Write = Callable[[str, Any], Path]
Read = Callable[..., Task]


def records(prefix: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{prefix} {i}", "answer": "a"} for i in range(count)]


@pytest.fixture
def folder(write: Write) -> Path:
    write("task/test.json", records("test", 40))
    return write("task/train.json", records("train", 100)).parent


def prompts(samples: tuple[Sample, ...]) -> set[str]:
    return {sample.prompt for sample in samples}


def test_dev_is_carved_from_train_by_seed(folder: Path, read: Read) -> None:
    task = read(folder)
    assert (len(task.train), len(task.dev), len(task.test)) == (90, 10, 40)
    assert prompts(task.train) | prompts(task.dev) == {f"train {i}" for i in range(100)}
    assert read(folder) == task
    assert prompts(read(folder, seed=1).dev) != prompts(task.dev)
    assert prompts(read(folder, seed=1).test) == prompts(task.test)
    assert len(read(folder, dev_share=0.25).dev) == 25
    assert read(folder, dev_share=0).dev == ()


def test_a_carved_test_split_is_the_same_for_all_seeds(write: Write, read: Read) -> None:
    """So no seed trains on the samples with which settings that another seed chose are tested."""
    path = write("all.jsonl", records("sample", 60))
    tests = [prompts(read(path, seed=seed).test) for seed in range(3)]
    assert len(tests[0]) == 6
    assert tests == [tests[0]] * 3


def test_carved_dev_has_at_most_500(write: Write, read: Read, folder: Path) -> None:
    write("task/train.json", records("train", 6000))
    task = read(folder)
    assert (len(task.train), len(task.dev)) == (5500, 500)


def test_limits_take_a_random_subset_and_move_nothing(folder: Path, read: Read) -> None:
    whole = read(folder)
    small = read(folder, train_limit=20, dev_limit=5, test_limit=7)
    assert (len(small.train), len(small.dev), len(small.test)) == (20, 5, 7)
    assert small.train == whole.train[:20]
    assert small.dev == whole.dev[:5]
    assert small.test == whole.test[:7]
    assert [sample.prompt for sample in small.test] != [f"test {i}" for i in range(7)]
    assert prompts(read(folder, test_limit=7, seed=1).test) != prompts(small.test)
    assert len(read(folder, train_limit=1000).train) == 90


@pytest.mark.parametrize("seed", range(5))
def test_equal_prompts_never_stand_on_both_sides(write: Write, read: Read, seed: int) -> None:
    lines = [{"prompt": f"p {i // 4}", "answer": str(i)} for i in range(60)]
    task = read(write("all.jsonl", lines), seed=seed)
    sides = [prompts(task.train), prompts(task.dev), prompts(task.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 15
    assert len(task.train) + len(task.dev) + len(task.test) == 60


@pytest.mark.parametrize("seed", range(5))
def test_prompts_of_many_samples_do_not_swell_a_carved_split(write: Write, read: Read, seed: int) -> None:
    lines = [{"prompt": f"often {i % 10}" if i < 80 else f"p {i}", "answer": "a"} for i in range(100)]
    task = read(write("all.jsonl", lines), seed=seed)
    assert (len(task.train), len(task.dev), len(task.test)) == (80, 10, 10)


def test_few_distinct_prompts_are_still_divided(write: Write, read: Read) -> None:
    task = read(write("all.jsonl", [{"prompt": f"p {i % 3}", "answer": "a"} for i in range(12)]))
    assert [len(prompts(split)) for split in (task.train, task.dev, task.test)] == [1, 1, 1]
    assert prompts(task.train) | prompts(task.dev) | prompts(task.test) == {"p 0", "p 1", "p 2"}


def test_empty_splits(write: Write, read: Read, folder: Path) -> None:
    write("task/test.json", [])
    with pytest.raises(UserError, match=r"the test split of .* is empty"):
        read(folder)
    write("task/test.json", records("test", 1))
    write("task/eval.json", [])
    with pytest.raises(UserError, match=r"the dev split of .* is empty"):
        read(folder, dev_share=0)
    (folder / "eval.json").unlink()
    write("task/train.json", records("train", 1))
    with pytest.raises(UserError, match=r"the dev split of .* is empty .* dev_share: 0"):
        read(folder)
    assert len(read(folder, dev_share=0).train) == 1
    with pytest.raises(UserError, match=r"the train split of .* is empty"):
        read(write("none.jsonl", ""))


def test_a_split_of_bad_records_alone_is_empty(write: Write, read: Read, folder: Path) -> None:
    write("task/test.json", [{"prompt": "p", "answer": ""}])
    with pytest.raises(UserError, match=r"the test split of .* is empty"):
        read(folder, bad_records="skip")


def test_names(folder: Path) -> None:
    one = parse_config(TaskConfig, {"name": "a", "path": str(folder)})
    with pytest.raises(UserError, match="2 tasks are named 'a'"):
        load_stream([one, one], DataConfig(), 0)
    with pytest.raises(UserError, match="at least one task"):
        load_stream([], DataConfig(), 0)
    two = parse_config(TaskConfig, {"name": "b", "path": str(folder)})
    assert [task.name for task in load_stream([two, one], DataConfig(), 0)] == ["b", "a"]


def test_cl_benchmark_as_published(shared_data: Path, read: Read) -> None:
    root = shared_data / "cl_benchmark"
    sizes = {"agnews": (4000, 7600, 4), "dbpedia": (4600, 3000, 14), "sst2": (2000, 872, 2)}
    for name, (train, test, labels) in sizes.items():
        task = read(root / name)
        assert task.metric == "accuracy"
        assert (len(task.train) + len(task.dev), len(task.test), len(task.labels or ())) == (train, test, labels)
    assert read(root / "agnews").labels == ("World", "Sports", "Business", "Science or Technology")
    with pytest.raises(UserError, match=r"mnli/test\.json, record 77: the answer is not in the label set"):
        read(root / "mnli")
    assert len(read(root / "mnli", bad_records="skip").test) == 7600 - 131
