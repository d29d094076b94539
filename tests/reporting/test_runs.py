"""Reading run directories: damaged or unfinished files are reported, and the other files are still read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dscl.reporting.runs import find_runs, read_run
from dscl.utils.errors import UserError
from tests.reporting.example_runs import write_comparison, write_run


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_complete_run_is_read(tmp_path: Path) -> None:
    numbers = {"capacity_bytes": 100.0, "peak_memory_bytes": 7.0, "trainable_parameters": 3.0}
    run = read_run(write_run(tmp_path / "a", zero_shot=(0.1, 0.2), heldout=[3.0, 3.1, 3.2], numbers=numbers), "mine")
    assert (run.problem, run.metrics.problem, run.row, run.seed) == ("", "", "mine", 0)
    assert run.scores is not None
    assert run.scores.matrix == [[0.8, None], [0.6, 0.9]]
    assert run.scores.zero_shot == [0.1, 0.2]
    assert run.scores.heldout_losses == [3.0, 3.1, 3.2]
    metrics = run.metrics
    assert (metrics.num_steps, metrics.tokens, metrics.seconds, metrics.peak_memory, metrics.trainable_parameters) == (
        4,
        40.0,
        4.0,
        7.0,
        3.0,
    )
    assert [metrics.last_records[task]["capacity_bytes"] for task in ("one", "two")] == [50.0, 100.0]
    assert metrics.losses == (("one", 1.0), ("one", 0.5), ("two", 1.0), ("two", 0.5))


@pytest.mark.parametrize(("scores", "rows"), [((), 0), (((0.8, None),), 1)])
def test_unfinished_run_reports_its_progress(tmp_path: Path, scores: tuple, rows: int) -> None:
    run = read_run(write_run(tmp_path / "a", scores=scores))
    assert run.problem == f"unfinished: {rows} of 2 tasks scored, 2 steps done, the last of one"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["matrix"][1].__setitem__(0, float("nan")), "the score of one after two is nan"),
        (lambda d: d["matrix"][0].__setitem__(0, float("inf")), "the score of one after one is inf"),
        (lambda d: d["summary"].update(OP=float("nan")), "OP is nan"),
        (lambda d: d["matrix"][1].__setitem__(1, 1.5), "scores.json is damaged: the score of two after two is 1.5"),
        (lambda d: d["matrix"][1].__setitem__(1, -0.1), "scores.json is damaged: the score of two after two is -0.1"),
        (lambda d: d["matrix"][1].__setitem__(1, "x"), "scores.json is damaged: the score of two after two is 'x'"),
        (lambda d: d["matrix"][1].pop(), "scores.json is damaged: the row after two"),
        (lambda d: d["matrix"].pop(), "scores.json is damaged: complete, with 1 rows for 2 tasks"),
        (lambda d: d.pop("matrix"), "scores.json is damaged: matrix is no list"),
        (lambda d: d.pop("summary"), "scores.json is damaged: it holds no summary"),
        (lambda d: d.update(summary=[]), "scores.json is damaged: it holds no summary"),
        (lambda d: d.update(tasks=["one", 2]), "scores.json is damaged: tasks"),
        (lambda d: d.update(metrics=[]), "scores.json is damaged: metrics"),
        (lambda d: d.update(tasks=["one", "other"]), "scores.json is of one, other, recipe.yaml of one, two"),
        (lambda d: d.update(heldout=3.0), "scores.json is damaged: heldout is no list"),
        (lambda d: d.update(routing_accuracy="all"), "scores.json is damaged: routing_accuracy is no list"),
        (lambda d: d.update(oracle_task_id={"matrix": None}), "scores.json is damaged: oracle_task_id is no list"),
        (lambda d: d.update(confusion=[1]), "scores.json is damaged: confusion is no object"),
        (lambda d: d.update(confusion={"tasks": ["one"], "answered_by": [None], "shares": []}), "confusion has no row"),
    ],
)
def test_damaged_scores_are_reported(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    folder = write_run(tmp_path / "a")
    edit_json(folder / "scores.json", change)
    run = read_run(folder)
    assert message in run.problem
    assert run.scores is None


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", '{"tasks": [', "[" * 100_000])
@pytest.mark.parametrize("name", ["scores.json", "recipe.yaml"])
def test_malformed_files_are_reported(tmp_path: Path, name: str, content: str) -> None:
    folder = write_run(tmp_path / "a")
    (folder / name).write_bytes(content.encode("latin-1"))
    assert read_run(folder).problem.startswith(f"{name} is damaged: ")


@pytest.mark.parametrize(
    "recipe", ["stream: []", "stream: [{name: a}]", "{stream: [{name: a}], method: {name: b}, train: 3}"]
)
def test_incomplete_recipe_is_reported(tmp_path: Path, recipe: str) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "recipe.yaml").write_text(recipe)
    assert read_run(folder).problem.startswith("recipe.yaml is damaged: ")


def test_unreadable_metrics_lines_remove_the_sums(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "ta\n[1]\n')
    run = read_run(folder)
    assert run.problem == ""
    assert run.metrics.tokens is None
    assert run.metrics.problem == "lines of metrics.jsonl that cannot be read: 2; its sums are left out"
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder).metrics.tokens is None


def test_repeated_step_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write((folder / "metrics.jsonl").read_text())
    assert read_run(folder).metrics.tokens == 40.0


def test_find_runs_searches_subfolders(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "x" / name) for name in ("a", "b/c")]
    (runs[0] / "checkpoints" / "inner").mkdir(parents=True)
    (runs[0] / "checkpoints" / "inner" / "recipe.yaml").write_text("")
    write_comparison(tmp_path / "x", {})
    assert find_runs([tmp_path / "x", runs[0]]) == (runs, [tmp_path / "x" / "comparison.json"])


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_folder_without_runs_is_rejected(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        find_runs([tmp_path / name])
