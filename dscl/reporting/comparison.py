"""Read comparison.json: the learning rates that a comparison tried, their scores on the dev split, and failed runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscl.reporting.scores import DamagedFileError, read_json


@dataclass(frozen=True)
class Trial:
    """One learning rate of one row, evaluated on the dev split."""

    rate: float
    summary: Mapping[str, float | None] | None  # OP and BWT; None if the trial was not run or failed
    chosen: bool


@dataclass(frozen=True)
class FailedRun:
    """A `dscl train` of the comparison that ended with an error."""

    run: str
    status: str  # exit status
    message: str  # the last line of its log
    log: str  # path of its log


@dataclass(frozen=True)
class ComparisonResult:
    """The content of a comparison.json."""

    folder: Path
    stream: str = ""  # the file with the comparison's recipe
    rule: str = ""  # how a learning rate was chosen, in words
    trials: Mapping[str, tuple[Trial, ...]] | None = None  # by row
    failed_runs: tuple[FailedRun, ...] = ()
    deviations: tuple[str, ...] = ()  # differences between the rows' budgets, in words
    folder_rows: Mapping[Path, str] | None = None  # run folder, or the parent folder of a row's runs → row
    problem: str = ""

    @property
    def has_search(self) -> bool:
        """Whether a row tried more than one learning rate."""
        return any(len(trials) > 1 for trials in (self.trials or {}).values())

    def find_row(self, run_folder: Path) -> str:
        """The row that a run belongs to; empty if the run is not part of this comparison."""
        folder_rows = self.folder_rows or {}
        return folder_rows.get(run_folder.resolve()) or folder_rows.get(run_folder.resolve().parent, "")


def read_comparison_result(path: Path) -> ComparisonResult:
    """Read a comparison.json. If it is damaged, the result's `problem` says how."""
    folder = path.parent
    try:
        return _parse_comparison(folder, read_json(path) or {})
    except DamagedFileError as error:
        return ComparisonResult(folder, problem=str(error))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return ComparisonResult(folder, problem=f"comparison.json is damaged: {type(error).__name__} {error}")


def _parse_comparison(folder: Path, document: Mapping[str, Any]) -> ComparisonResult:
    rows = document["rows"]
    max_forgetting, search_limit = document.get("max_forgetting"), document.get("search_limit")
    rule = "the highest OP on the dev split"
    if max_forgetting is not None:
        rule += f", among the rates whose BWT there is at least -{max_forgetting:g} if there are any"
    if search_limit is not None:
        rule += f"; tried with {search_limit:,} training samples a task"
    failed_runs = {
        (entry["run"], str(entry.get("log", ""))): FailedRun(
            entry["run"], str(entry.get("status", "")), str(entry.get("message", "")), str(entry.get("log", ""))
        )
        for row in rows.values()
        for entry in row.get("failed", [])
    }
    deviations = tuple(map(str, document.get("deviations", [])))
    if int(document.get("max_parallel", 1)) > 1:
        deviations += (
            f"all: {document['max_parallel']} runs shared the machine, so their times are not those of single runs",
        )
    return ComparisonResult(
        folder=folder,
        stream=str(document["stream"]),
        rule=rule,
        trials={str(name): _parse_trials(row, document["learning_rates"].get(name, [])) for name, row in rows.items()},
        failed_runs=tuple(failed_runs.values()),
        deviations=deviations,
        folder_rows=_map_folders_to_rows(folder, {name: row.get("runs", []) for name, row in rows.items()}),
    )


def _parse_trials(row: Mapping[str, Any], grid: list[float]) -> tuple[Trial, ...]:
    """The trials of a row; `grid` are the learning rates that it was to try."""
    summaries = {
        float(rate): {name: None if summary.get(name) is None else float(summary[name]) for name in ("OP", "BWT")}
        for rate, summary in row["trials"].items()
    }
    rates = sorted({*map(float, grid), *summaries})
    return tuple(Trial(rate, summaries.get(rate), rate == row.get("learning_rate")) for rate in rates)


def _map_folders_to_rows(folder: Path, runs: Mapping[str, list[str]]) -> dict[Path, str]:
    """Map run folders to their row. A parent folder with runs of a single row also stands for the row's trials."""
    run_rows = {(folder / run).resolve(): row for row, run_folders in runs.items() for run in run_folders}
    parent_rows: dict[Path, set[str]] = {}
    for run_folder, row in run_rows.items():
        parent_rows.setdefault(run_folder.parent, set()).add(row)
    return run_rows | {parent: rows.pop() for parent, rows in parent_rows.items() if len(rows) == 1}
