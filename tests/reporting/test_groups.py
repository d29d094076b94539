"""Seeds are averaged, and nothing else is: what differs in more is another row, or another table."""

from __future__ import annotations

from pathlib import Path

import pytest

from dscl.reporting.groups import Group, grouped
from dscl.reporting.runs import read_run
from tests.reporting.made import run


def groups_of(tmp_path: Path, *runs: tuple[str, ...], **settings: object) -> list[Group]:
    return grouped([read_run(run(tmp_path / str(i), *words, **settings)) for i, words in enumerate(runs)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "word",
    ["seed=1", "observe.every=3", "checkpoint.every=3", "data.cache_dir=elsewhere", "stream.0.dev_limit=5"],
)
def test_runs_that_differ_in_this_alone_are_one_row(tmp_path: Path, word: str) -> None:
    ((row,),) = [group.rows for group in groups_of(tmp_path, (), (word,))]
    assert len(row.runs) + len(row.aside) == 2
    assert row.label == "sequential"


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ((), ("sequential", "osft")),
        (("method.share=0.5",), ("osft (share 0.3)", "osft (share 0.5)")),
        (("train.lr=0.1",), ("osft (lr 0.001)", "osft (lr 0.1)")),
        (("train.lr=0.1", "method.share=0.5"), ("osft (share 0.3, lr 0.001)", "osft (share 0.5, lr 0.1)")),
        (("deepspeed=zero3.json",), ("osft (deepspeed ds_configs/zero1.json)", "osft (deepspeed zero3.json)")),
        (("stream.1.lr=0.1",), ("osft (stream.1.lr unset)", "osft (stream.1.lr 0.1)")),
    ],
)
def test_other_settings_are_another_row_and_named(tmp_path: Path, words: tuple, labels: tuple) -> None:
    osft = ("method.name=osft", "method.share=0.3")
    (group,) = groups_of(tmp_path, osft if words else (), (*osft, *words))
    assert tuple(row.label for row in group.rows) == labels


def test_what_another_method_does_not_have_is_not_told(tmp_path: Path) -> None:
    lora = ("method.tune=lora", "method.lora.rank=8", "method.lora.alpha=16")
    (group,) = groups_of(tmp_path, (), lora)
    assert [row.label for row in group.rows] == ["sequential (tune full)", "sequential (tune lora)"]


@pytest.mark.parametrize(
    ("word", "fact"),
    [
        ("stream.0.path=elsewhere", "data"),
        ("stream.0.train_limit=7", "training samples"),
        ("stream.0.epochs=2", "epochs"),
        ("train.epochs=2", "epochs"),
        ("train.global_batch=4", "batch"),
        ("train.max_length=32", "length"),
        ("train.precision=bf16", "precision"),
        ("model.name=other", "model"),
        ("evaluate.split=dev", "split"),
        ("evaluate.mode=generate", "answers"),
        ("stream.1.test_limit=5", "samples scored"),
        ("stream.0.template='{prompt}!'", "template"),
    ],
)
def test_other_budgets_are_another_table_that_says_so(tmp_path: Path, word: str, fact: str) -> None:
    groups = groups_of(tmp_path, (), (word,))
    assert len(groups) == 2
    for group in groups:
        assert fact in group.apart
        assert set(group.apart) <= {fact, "samples scored"}
    assert groups[0].apart[fact] != groups[1].apart[fact]


def test_other_tasks_and_orders_are_other_tables(tmp_path: Path) -> None:
    runs = [run(tmp_path / str(i), tasks=tasks) for i, tasks in enumerate((("one", "two"), ("two", "one"), ("a", "b")))]
    groups = grouped(map(read_run, runs))
    assert [group.facts["tasks"] for group in groups] == ["one → two", "two → one", "a → b"]
    assert all(not group.apart for group in groups)


def test_other_metrics_are_another_table(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a"), run(tmp_path / "b", "seed=1", metrics=["rouge_l", "rouge_l"])]
    assert len(grouped(map(read_run, runs))) == 1  # the recipes are one row; only somebody's hand makes this
    runs[1] = run(tmp_path / "c", "method.name=osft", metrics=["rouge_l", "accuracy"])
    groups = grouped(map(read_run, runs))
    assert [group.apart for group in groups] == [{"metric": "accuracy"}, {"metric": "one rouge_l, two accuracy"}]


def test_the_dev_split_comes_last(tmp_path: Path) -> None:
    assert [group.facts["split"] for group in groups_of(tmp_path, ("evaluate.split=dev",), ())] == ["test", "dev"]


def test_a_run_without_scores_stands_with_its_like(tmp_path: Path) -> None:
    runs = [
        run(tmp_path / "a", "method.name=osft", scores=()),
        run(tmp_path / "b"),
        run(tmp_path / "c", "seed=1", scores=()),
    ]
    (group,) = grouped(map(read_run, runs))
    assert [(row.label, len(row.runs), len(row.aside)) for row in group.rows] == [("sequential", 1, 1), ("osft", 0, 1)]


def test_the_same_seed_counts_once_and_the_finished_run_is_it(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", scores=()), run(tmp_path / "b"), run(tmp_path / "c")]
    ((row,),) = [group.rows for group in grouped(map(read_run, runs))]
    assert [of.folder.name for of in row.runs] == ["b"]
    told = {of.folder.name: why for of, why in row.aside}
    assert told["a"].startswith("unfinished")
    assert told["c"] == f"seed 0 again, as in {runs[1]}, which is the one that counts"


def test_a_comparison_names_its_rows(tmp_path: Path) -> None:
    runs = [read_run(run(tmp_path / name), name) for name in ("first", "second")]
    (group,) = grouped(runs)
    assert [row.label for row in group.rows] == ["first", "second"]
