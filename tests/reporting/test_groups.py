"""Grouping: runs that differ only in the seed form one row; other differences form other rows or tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from dscl.reporting.groups import ReportGroup, group_runs
from dscl.reporting.runs import read_run
from tests.reporting.example_runs import write_run


def group_example_runs(tmp_path: Path, *runs: tuple[str, ...], **settings: object) -> list[ReportGroup]:
    return group_runs([read_run(write_run(tmp_path / str(i), *words, **settings)) for i, words in enumerate(runs)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "word",
    ["seed=1", "observe.every=3", "checkpoint.every=3", "data.cache_dir=elsewhere", "stream.0.dev_limit=5"],
)
def test_runs_that_differ_only_in_run_keys_form_one_row(tmp_path: Path, word: str) -> None:
    ((row,),) = [group.rows for group in group_example_runs(tmp_path, (), (word,))]
    assert len(row.runs) + len(row.excluded) == 2
    assert row.label == "sequential"


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ((), ("sequential", "osft")),
        (
            ("method.constraint.protected_ratio=0.5",),
            ("osft (constraint.protected_ratio 0.3)", "osft (constraint.protected_ratio 0.5)"),
        ),
        (("train.lr=0.1",), ("osft (lr 0.001)", "osft (lr 0.1)")),
        (
            ("train.lr=0.1", "method.constraint.protected_ratio=0.5"),
            ("osft (constraint.protected_ratio 0.3, lr 0.001)", "osft (constraint.protected_ratio 0.5, lr 0.1)"),
        ),
        (("deepspeed=zero3.json",), ("osft (deepspeed ds_configs/zero1.json)", "osft (deepspeed zero3.json)")),
        (("stream.1.lr=0.1",), ("osft (stream.1.lr unset)", "osft (stream.1.lr 0.1)")),
    ],
)
def test_different_settings_form_labelled_rows(tmp_path: Path, words: tuple, labels: tuple) -> None:
    osft = ("method.name=osft", "method.constraint.protected_ratio=0.3")
    (group,) = group_example_runs(tmp_path, osft if words else (), (*osft, *words))
    assert tuple(row.label for row in group.rows) == labels


def test_label_omits_settings_that_other_methods_lack(tmp_path: Path) -> None:
    lora = ("method.tune.name=lora", "method.tune.rank=8", "method.tune.alpha=16")
    (group,) = group_example_runs(tmp_path, (), lora)
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
def test_different_budgets_form_tables_with_distinguishing_facts(tmp_path: Path, word: str, fact: str) -> None:
    groups = group_example_runs(tmp_path, (), (word,))
    assert len(groups) == 2
    for group in groups:
        assert fact in group.distinguishing_facts
        assert set(group.distinguishing_facts) <= {fact, "samples scored"}
    assert groups[0].distinguishing_facts[fact] != groups[1].distinguishing_facts[fact]


def test_different_tasks_or_orders_form_separate_tables(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / str(i), tasks=tasks)
        for i, tasks in enumerate((("one", "two"), ("two", "one"), ("a", "b")))
    ]
    groups = group_runs(map(read_run, runs))
    assert [group.facts["tasks"] for group in groups] == ["one → two", "two → one", "a → b"]
    assert all(not group.distinguishing_facts for group in groups)


def test_different_metrics_form_separate_tables(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", "seed=1", metrics=["rouge_l", "rouge_l"])]
    # Equal recipes form one row; only an edited file has other metrics.
    assert len(group_runs(map(read_run, runs))) == 1
    runs[1] = write_run(tmp_path / "c", "method.name=osft", metrics=["rouge_l", "accuracy"])
    groups = group_runs(map(read_run, runs))
    assert [group.distinguishing_facts for group in groups] == [
        {"metric": "accuracy"},
        {"metric": "one rouge_l, two accuracy"},
    ]


def test_the_dev_split_comes_last(tmp_path: Path) -> None:
    assert [group.facts["split"] for group in group_example_runs(tmp_path, ("evaluate.split=dev",), ())] == [
        "test",
        "dev",
    ]


def test_run_without_scores_joins_the_matching_table(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", "method.name=osft", scores=()),
        write_run(tmp_path / "b"),
        write_run(tmp_path / "c", "seed=1", scores=()),
    ]
    (group,) = group_runs(map(read_run, runs))
    assert [(row.label, len(row.runs), len(row.excluded)) for row in group.rows] == [
        ("sequential", 1, 1),
        ("osft", 0, 1),
    ]


def test_duplicate_seed_counts_once_and_complete_run_is_preferred(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", scores=()), write_run(tmp_path / "b"), write_run(tmp_path / "c")]
    ((row,),) = [group.rows for group in group_runs(map(read_run, runs))]
    assert [run.folder.name for run in row.runs] == ["b"]
    reasons = {run.folder.name: reason for run, reason in row.excluded}
    assert reasons["a"].startswith("unfinished")
    assert reasons["c"] == f"seed 0 again; the averages use {runs[1]}"


def test_a_comparison_names_its_rows(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name), name) for name in ("first", "second")]
    (group,) = group_runs(runs)
    assert [row.label for row in group.rows] == ["first", "second"]
