"""Write example run directories and comparisons for the tests, with chosen scores and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dscl.config.parsing import apply_overrides
from tests.support.score_boards import make_score_board

TASKS = ("one", "two")


def make_recipe(*assignments: str, tasks: Sequence[str] = TASKS) -> dict[str, Any]:
    stream = [
        {"name": name, "path": f"data/{name}", "metric": None, "epochs": None, "train_limit": 50, "test_limit": 20}
        for name in tasks
    ]
    recipe: dict[str, Any] = {
        "run_dir": "out/somewhere",
        "seed": 0,
        "model": {"name": "base", "shape": None},
        "method": {"name": "sequential", "tune": {"name": "full"}},
        "stream": stream,
        "data": {"bad_records": "stop", "cache_dir": None},
        "train": {"lr": 1e-3, "epochs": 1, "global_batch": 8, "max_length": 64, "precision": "fp32"},
        "evaluate": {"mode": "rank", "split": "test", "heldout": None},
        "deepspeed": "ds_configs/zero1.json",
        "checkpoint": {"every": 100},
        "observe": {"every": 10},
    }
    return apply_overrides(recipe, assignments)


def write_run(
    folder: Path,
    *assignments: str,
    scores: Sequence[Sequence[float | None]] = ((0.8, None), (0.6, 0.9)),
    zero_shot: Sequence[float] | None = None,
    tasks: Sequence[str] = TASKS,
    steps: int = 2,
    numbers: Mapping[str, float] | None = None,
    **others: Any,
) -> Path:
    """A run of `steps` steps a task, 10 tokens and a second each; `numbers` stand in each task's last record,
    in an earlier task's with half of the bytes."""
    folder.mkdir(parents=True)
    recipe = make_recipe(*assignments, f"run_dir={folder}", tasks=tasks)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "utf-8")
    rows = [list(row) for row in scores]
    if rows:
        document = make_score_board(rows, zero_shot, tasks).to_json()
        (folder / "scores.json").write_text(json.dumps(document | others), "utf-8")
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for i, task in enumerate(tasks[: max(1, len(rows))]):
            for k in range(1, steps + 1):
                record = {"step": i * steps + k, "task": task, "loss": 1.0 / k, "tokens": 10, "seconds": 1.0}
                if k == steps:
                    record |= numbers or {}
                    if i + 1 < len(tasks):
                        record |= {name: record[name] / 2 for name in record if name.endswith("_bytes")}
                file.write(json.dumps(record) + "\n")
    return folder


def write_comparison(folder: Path, rows: Mapping[str, Any], **others: Any) -> None:
    document = {
        "stream": "stream.yaml",
        "learning_rates": {row: [0.001] for row in rows},
        "rows": rows,
        "deviations": [],
    }
    (folder / "comparison.json").write_text(json.dumps(document | others), "utf-8")
