"""From the folders that were given to runs: what each was told, what it came to, and what is wrong with it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dscl.config.parsing import read_yaml
from dscl.reporting.scores import Damaged, Scores, read_scores, real, text
from dscl.utils.errors import UserError


@dataclass(frozen=True)
class Metrics:
    """A metrics.jsonl; sums are None where a line is missing from them."""

    losses: tuple[tuple[str, float], ...] = ()  # (task, loss), one a step
    steps: int = 0
    tokens: float | None = None
    seconds: float | None = None
    peak: float | None = None  # bytes of memory
    trainable: float | None = None
    ended: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # each task's last record
    trouble: str = ""


@dataclass(frozen=True)
class Run:
    folder: Path
    row: str  # what a comparison calls its row; else empty
    recipe: Mapping[str, Any]  # empty where it cannot be read
    scores: Scores | None
    metrics: Metrics
    trouble: str  # why it takes no part in averages; else empty

    @property
    def seed(self) -> Any:
        return self.recipe.get("seed")


def find(given: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The runs, each once, and the comparison.json files, in these folders and below them."""
    runs: dict[Path, Path] = {}
    comparisons: dict[Path, Path] = {}
    for start in given:
        if not start.is_dir():
            raise UserError(f"{start}: no such folder; give run directories, or folders that hold some")
        there = 0
        for place, folders, files in os.walk(start):
            folder = Path(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if "recipe.yaml" in files:
                there += 1
                folders.clear()
                runs.setdefault(folder.resolve(), folder)
            elif "comparison.json" in files:
                there += 1
                comparisons.setdefault(folder.resolve(), folder / "comparison.json")
        if not there:
            raise UserError(
                f"{start}: holds no run; a run directory holds recipe.yaml, so give one, or a folder that holds some"
            )
    return list(runs.values()), list(comparisons.values())


def read_run(folder: Path, row: str = "") -> Run:
    """Whatever is wrong with it stands in its `trouble`."""
    try:
        recipe = _recipe(folder / "recipe.yaml")
    except Damaged as error:
        return Run(folder, row, {}, None, Metrics(), str(error))
    metrics = _metrics(folder / "metrics.jsonl")
    names = [task["name"] for task in recipe["stream"]]
    try:
        scores = read_scores(folder / "scores.json")
        if scores is not None and list(scores.tasks) != names:
            raise Damaged(f"scores.json is of {', '.join(scores.tasks)}, recipe.yaml of {', '.join(names)}")
    except Damaged as error:
        return Run(folder, row, recipe, None, metrics, str(error))
    trouble = ""
    if scores is None or not scores.complete:
        rows = len(scores.matrix) if scores else 0
        at = f", {metrics.steps:,} steps done, the last of {metrics.losses[-1][0]}" if metrics.losses else ""
        trouble = f"unfinished: {rows} of {len(names)} tasks scored{at}"
    return Run(folder, row, recipe, scores, metrics, trouble)


def _recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = read_yaml(str(path))
    except UserError as error:
        raise Damaged(f"recipe.yaml is damaged: {str(error).removeprefix(f'{path}: ')}") from None
    stream, method = recipe.get("stream"), recipe.get("method")
    if not (isinstance(stream, list) and stream and all(isinstance(t, dict) and text(t.get("name")) for t in stream)):
        raise Damaged("recipe.yaml is damaged: it names no tasks")
    if not (isinstance(method, dict) and text(method.get("name"))):
        raise Damaged("recipe.yaml is damaged: it names no method")
    for section in ("model", "train", "evaluate"):
        if not isinstance(recipe.setdefault(section, {}), dict):
            raise Damaged(f"recipe.yaml is damaged: {section} is no mapping")
    return recipe


def _metrics(path: Path) -> Metrics:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return Metrics(trouble="metrics.jsonl is not there or cannot be read")
    records: dict[int, tuple[str, dict[str, float]]] = {}
    unread = 0
    for line in lines:
        try:
            record = json.loads(line)
            numbers = {name: float(value) for name, value in record.items() if real(value) and math.isfinite(value)}
            records[int(numbers["step"])] = str(record["task"]), numbers
        except (ValueError, KeyError, AttributeError, OverflowError):
            unread += 1
    ordered = [records[step] for step in sorted(records)]

    def sum_of(name: str) -> float | None:
        values = [numbers.get(name) for _, numbers in ordered]
        known = [value for value in values if value is not None]
        return math.fsum(known) if known and len(known) == len(values) and not unread else None

    def most(name: str) -> float | None:
        return max((numbers[name] for _, numbers in ordered if name in numbers), default=None)

    return Metrics(
        losses=tuple((task, numbers["loss"]) for task, numbers in ordered if "loss" in numbers),
        steps=len(ordered),
        tokens=sum_of("tokens"),
        seconds=sum_of("seconds"),
        peak=most("peak_memory_bytes"),
        trainable=most("trainable_parameters"),
        ended=dict(ordered),
        trouble=f"lines of metrics.jsonl that cannot be read: {unread}; its sums are left out" if unread else "",
    )
