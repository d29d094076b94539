"""comparison.json: which learning rates a comparison tried, what the dev split said, and what failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscl.reporting.scores import Damaged, read_json


@dataclass(frozen=True)
class Trial:
    """One learning rate of one row on the dev split."""

    rate: float
    summary: Mapping[str, float | None] | None  # None: it was not run, or it failed
    chosen: bool


@dataclass(frozen=True)
class Failed:
    run: str
    status: str
    said: str
    log: str


@dataclass(frozen=True)
class Comparison:
    folder: Path
    stream: str = ""
    rule: str = ""  # by which a rate was chosen
    trials: Mapping[str, tuple[Trial, ...]] | None = None  # by row
    failed: tuple[Failed, ...] = ()
    deviations: tuple[str, ...] = ()
    places: Mapping[Path, str] | None = None  # the folders of runs, and those around them, to their row
    trouble: str = ""

    @property
    def searched(self) -> bool:
        return any(len(tried) > 1 for tried in (self.trials or {}).values())

    def row(self, run: Path) -> str:
        """The row that a run belongs to; empty where it is none of this comparison's."""
        places = self.places or {}
        return places.get(run.resolve()) or places.get(run.resolve().parent, "")


def read_comparison(path: Path) -> Comparison:
    folder = path.parent
    try:
        return _parsed(folder, read_json(path) or {})
    except Damaged as error:
        return Comparison(folder, trouble=str(error))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return Comparison(folder, trouble=f"comparison.json is damaged: {type(error).__name__} {error}")


def _parsed(folder: Path, found: Mapping[str, Any]) -> Comparison:
    rows = found["rows"]
    keeps, limit = found.get("keeps"), found.get("search_limit")
    rule = "the highest OP on the dev split"
    if keeps is not None:
        rule += f", among the rates whose BWT there is at least -{keeps:g} if there are any"
    if limit is not None:
        rule += f"; tried with {limit:,} training samples a task"
    failed = {
        (entry["run"], str(entry.get("log", ""))): Failed(
            entry["run"], str(entry.get("status", "")), str(entry.get("said", "")), str(entry.get("log", ""))
        )
        for row in rows.values()
        for entry in row.get("failed", [])
    }
    deviations = tuple(map(str, found.get("deviations", [])))
    if int(found.get("at_once", 1)) > 1:
        deviations += (f"all: {found['at_once']} runs went on at once, so their seconds are of a shared machine",)
    return Comparison(
        folder=folder,
        stream=str(found["stream"]),
        rule=rule,
        trials={str(name): _trials(row, found["rates"].get(name, [])) for name, row in rows.items()},
        failed=tuple(failed.values()),
        deviations=deviations,
        places=_places(folder, {name: row.get("runs", []) for name, row in rows.items()}),
    )


def _trials(row: Mapping[str, Any], grid: list[float]) -> tuple[Trial, ...]:
    said = {
        float(rate): {name: None if summary.get(name) is None else float(summary[name]) for name in ("OP", "BWT")}
        for rate, summary in row["rates"].items()
    }
    rates = sorted({*map(float, grid), *said})
    return tuple(Trial(rate, said.get(rate), rate == row.get("rate")) for rate in rates)


def _places(folder: Path, runs: Mapping[str, list[str]]) -> dict[Path, str]:
    """A row's trials stand beside its runs, where the rows have folders of their own."""
    places = {(folder / run).resolve(): row for row, folders in runs.items() for run in folders}
    around: dict[Path, set[str]] = {}
    for place, row in places.items():
        around.setdefault(place.parent, set()).add(row)
    return places | {place: rows.pop() for place, rows in around.items() if len(rows) == 1}
