"""Read run directories: each run's recipe, scores and metrics, and the problems found in its files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dscl.config.parsing import read_yaml
from dscl.monitoring.score_board import ScoreBoard
from dscl.reporting.scores import DamagedFileError, is_nonempty_text, is_number, read_scores
from dscl.utils.errors import UserError


@dataclass(frozen=True)
class RunMetrics:
    """The content of a metrics.jsonl. A sum is None if it would lack the value of a step."""

    losses: tuple[tuple[str, float], ...] = ()  # (task, loss) of each step
    num_steps: int = 0
    tokens: float | None = None  # sum over the steps
    seconds: float | None = None  # sum over the steps
    peak_memory: float | None = None  # bytes
    trainable_parameters: float | None = None
    last_records: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # task → the record of its last step
    problem: str = ""  # what could not be read; else empty


@dataclass(frozen=True)
class RunRecord:
    """The files of one run directory."""

    folder: Path
    row: str  # the run's row in a comparison; else empty
    recipe: Mapping[str, Any]  # empty if it cannot be read
    scores: ScoreBoard | None
    metrics: RunMetrics
    problem: str  # why averages leave this run out; else empty

    @property
    def seed(self) -> Any:
        return self.recipe.get("seed")


def find_runs(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Find run directories and comparison.json files in these folders and below them, each once."""
    runs: dict[Path, Path] = {}
    comparisons: dict[Path, Path] = {}
    for start in paths:
        if not start.is_dir():
            raise UserError(f"{start}: no such folder; give run directories, or folders that hold some")
        num_found = 0
        for parent, subfolders, files in os.walk(start):
            folder = Path(parent)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            if "recipe.yaml" in files:
                num_found += 1
                subfolders.clear()  # os.walk does not descend into a run directory
                runs.setdefault(folder.resolve(), folder)
            elif "comparison.json" in files:
                num_found += 1
                comparisons.setdefault(folder.resolve(), folder / "comparison.json")
        if not num_found:
            raise UserError(
                f"{start}: holds no run; a run directory holds recipe.yaml, so give one, or a folder that holds some"
            )
    return list(runs.values()), list(comparisons.values())


def read_run(folder: Path, row: str = "") -> RunRecord:
    """Read a run directory. Damaged or unfinished content does not raise: it is described in `problem`."""
    try:
        recipe = _read_recipe(folder / "recipe.yaml")
    except DamagedFileError as error:
        return RunRecord(folder, row, {}, None, RunMetrics(), str(error))
    metrics = _read_metrics(folder / "metrics.jsonl")
    names = [task["name"] for task in recipe["stream"]]
    try:
        scores = read_scores(folder / "scores.json")
        if scores is not None and list(scores.tasks) != names:
            raise DamagedFileError(f"scores.json is of {', '.join(scores.tasks)}, recipe.yaml of {', '.join(names)}")
    except DamagedFileError as error:
        return RunRecord(folder, row, recipe, None, metrics, str(error))
    problem = ""
    if scores is None or not scores.is_complete:
        num_scored = len(scores.rows) if scores else 0
        progress = ""
        if metrics.losses:
            progress = f", {metrics.num_steps:,} steps done, the last of {metrics.losses[-1][0]}"
        problem = f"unfinished: {num_scored} of {len(names)} tasks scored{progress}"
    return RunRecord(folder, row, recipe, scores, metrics, problem)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = read_yaml(str(path))
    except UserError as error:
        raise DamagedFileError(f"recipe.yaml is damaged: {str(error).removeprefix(f'{path}: ')}") from None
    stream, method = recipe.get("stream"), recipe.get("method")
    if not (
        isinstance(stream, list)
        and stream
        and all(isinstance(t, dict) and is_nonempty_text(t.get("name")) for t in stream)
    ):
        raise DamagedFileError("recipe.yaml is damaged: it names no tasks")
    if not (isinstance(method, dict) and is_nonempty_text(method.get("name"))):
        raise DamagedFileError("recipe.yaml is damaged: it names no method")
    for section in ("model", "train", "evaluate"):
        if not isinstance(recipe.setdefault(section, {}), dict):
            raise DamagedFileError(f"recipe.yaml is damaged: {section} is no mapping")
    return recipe


def _read_metrics(path: Path) -> RunMetrics:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return RunMetrics(problem="metrics.jsonl is not there or cannot be read")
    records: dict[int, tuple[str, dict[str, float]]] = {}
    unreadable_lines = 0
    for line in lines:
        try:
            record = json.loads(line)
            numbers = {
                name: float(value) for name, value in record.items() if is_number(value) and math.isfinite(value)
            }
            records[int(numbers["step"])] = str(record["task"]), numbers
        except (ValueError, KeyError, AttributeError, OverflowError):
            unreadable_lines += 1
    ordered = [records[step] for step in sorted(records)]

    def sum_values(name: str) -> float | None:
        values = [numbers.get(name) for _, numbers in ordered]
        known = [value for value in values if value is not None]
        return math.fsum(known) if known and len(known) == len(values) and not unreadable_lines else None

    def max_value(name: str) -> float | None:
        return max((numbers[name] for _, numbers in ordered if name in numbers), default=None)

    return RunMetrics(
        losses=tuple((task, numbers["loss"]) for task, numbers in ordered if "loss" in numbers),
        num_steps=len(ordered),
        tokens=sum_values("tokens"),
        seconds=sum_values("seconds"),
        peak_memory=max_value("peak_memory_bytes"),
        trainable_parameters=max_value("trainable_parameters"),
        last_records=dict(ordered),
        problem=(
            f"lines of metrics.jsonl that cannot be read: {unreadable_lines}; its sums are left out"
            if unreadable_lines
            else ""
        ),
    )
