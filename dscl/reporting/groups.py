"""Which runs are one row (they differ in their seed alone), and which rows may stand in one table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dscl.reporting.runs import Run
from dscl.utils.formatting import shorten

# Two runs that differ in these alone are the same row.
OF_A_RUN = ("seed", "run_dir", "observe", "checkpoint", "data.cache_dir")
# What a table's heading says of it. The other facts tell tables apart too, and are said where they do.
HEADING = (
    "model",
    "training samples",
    "epochs",
    "batch",
    "length",
    "precision",
    "split",
    "samples scored",
    "metric",
    "answers",
)
LONGEST = 60  # characters of a setting's value in a label


@dataclass
class Row:
    name: str  # the comparison's, or the method's
    recipe: Mapping[str, Any]
    runs: list[Run] = field(default_factory=list)  # finished, one a seed
    aside: list[tuple[Run, str]] = field(default_factory=list)  # no part of the averages, and why
    label: str = ""


@dataclass
class Group:
    """Rows that may be compared: equal tasks, samples, budgets and evaluation."""

    tasks: tuple[str, ...]
    facts: Mapping[str, str]
    rows: list[Row]
    apart: dict[str, str] = field(default_factory=dict)  # the facts in which other groups differ

    @property
    def searching(self) -> bool:
        return self.facts["split"] == "dev"


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Tables in the order in which their first runs were given, those of the test split first."""
    groups: list[Group] = []
    # Only scores.json says which metric a task has by default, so rows without one are placed last.
    for row in sorted(_rows(runs), key=lambda row: _metrics(row) is None):
        facts = facts_of(row.recipe, _metrics(row))
        for group in groups:
            if all(facts.get(name, value) == value for name, value in group.facts.items()):
                group.rows.append(row)
                break
        else:
            groups.append(Group(tuple(task["name"] for task in row.recipe["stream"]), facts, [row]))
    groups.sort(key=lambda group: group.searching)
    for group in groups:
        _label(group.rows)
        group.apart = _apart(group, groups)
    return groups


def _rows(runs: Iterable[Run]) -> list[Row]:
    rows: dict[tuple[str, str], Row] = {}
    for run in runs:
        name = run.row or run.recipe["method"]["name"]
        key = name, json.dumps(settings_of(run.recipe), sort_keys=True, default=str)
        row = rows.setdefault(key, Row(name, run.recipe))
        same = next((other for other in row.runs if other.seed == run.seed), None)
        if run.trouble:
            row.aside.append((run, run.trouble))
        elif same is not None:
            row.aside.append((run, f"seed {run.seed} again, as in {same.folder}, which is the one that counts"))
        else:
            row.runs.append(run)
    for row in rows.values():
        row.runs.sort(key=lambda run: str(run.seed).zfill(20))
    return list(rows.values())


def settings_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """All that makes a row what it is, by dotted name; null is the same as left out."""
    unused = "test" if recipe["evaluate"].get("split") == "dev" else "dev"  # no score is of this split
    return {
        name: value
        for name, value in flat(recipe).items()
        if value is not None
        and not any(name == part or name.startswith(part + ".") for part in OF_A_RUN)
        and not (name.startswith("stream.") and name.endswith(f".{unused}_limit"))
    }


def _metrics(row: Row) -> tuple[str, ...] | None:
    runs = [*row.runs, *(run for run, _ in row.aside)]
    return next((run.scores.metrics for run in runs if run.scores), None)


def facts_of(recipe: Mapping[str, Any], metrics: Sequence[str] | None) -> dict[str, str]:
    """What runs must share to be comparable, in words; without the metric where nobody says it."""
    stream, train, evaluate, model = (recipe[name] for name in ("stream", "train", "evaluate", "model"))
    names = [task["name"] for task in stream]
    metrics = metrics or [task.get("metric") for task in stream]
    split = evaluate.get("split") or "test"
    mode = evaluate.get("mode") or "rank"

    def each(values: Sequence[Any]) -> str:
        shown = list(map(_shown, values))
        if len(set(shown)) == 1:
            return shown[0]
        return ", ".join(f"{name} {value}" for name, value in zip(names, shown, strict=True))

    def key(name: str, default: Any = None) -> str:
        return each([default if task.get(name) is None else task[name] for task in stream])

    return {
        "tasks": " → ".join(names),
        "model": str(model.get("name") or f"fresh ({_shown(model.get('shape'))})"),
        "tokenizer": _shown(model.get("tokenizer")),
        "data": key("path"),
        **{name: key(name) for name in ("format", "template", "labels", "columns", "chat")},
        "training samples": key("train_limit", "all"),
        "dev share": key("dev_share"),
        "epochs": key("epochs", train.get("epochs")),
        "batch": _shown(train.get("global_batch")),
        "length": _shown(train.get("max_length")),
        **{name: _shown(train.get(name)) for name in ("packing", "schedule", "warmup", "weight_decay", "grad_clip")},
        "bad records": _shown((recipe.get("data") or {}).get("bad_records")),
        "precision": _shown(train.get("precision")),
        "split": split,
        "samples scored": key(f"{split}_limit", "all"),
        **({"metric": each(metrics)} if all(metrics) else {}),
        "answers": "ranked" if mode == "rank" else f"generated, {_shown(evaluate.get('max_new_tokens'))} tokens",
    }


def _apart(group: Group, groups: Sequence[Group]) -> dict[str, str]:
    """Other tasks, or another order, have other data: that goes without saying."""
    others = [other for other in groups if other is not group]
    alike = [other for other in others if other.tasks == group.tasks]
    return {
        name: value
        for name, value in group.facts.items()
        if name != "tasks"
        and any(other.facts.get(name, value) != value for other in (others if name in HEADING else alike))
    }


def _label(rows: Sequence[Row]) -> None:
    """Name every row by what tells it from the others of its name, and by its rate where rates differ at all."""
    settings = {id(row): settings_of(row.recipe) for row in rows}
    rates = {str(row.recipe["train"].get("lr")) for row in rows}
    for row in rows:
        same = [settings[id(other)] for other in rows if other.name == row.name]
        own = settings[id(row)]
        names = [name for name in own if _differs(name, same, absent=False)]
        for other in same:  # told apart by what is there in one of the two alone
            if other is not own and all(own.get(name) == other.get(name) for name in names):
                names += [name for name in {**own, **other} if _differs(name, [own, other], absent=True)]
        names = [name for name in dict.fromkeys(names) if name != "train.lr"] + ["train.lr"] * (len(rates) > 1)
        told = ", ".join(f"{_short(name)} {shorten(_shown(own.get(name)), LONGEST)}" for name in names)
        row.label = f"{row.name} ({told})" if told else row.name


def _differs(name: str, settings: Sequence[Mapping[str, Any]], absent: bool) -> bool:
    values = [one.get(name) for one in settings if absent or name in one]
    return any(value != values[0] for value in values)


def _short(name: str) -> str:
    return name.removeprefix("method.").removeprefix("train.")


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of mappings, as dotted names; other lists are values."""
    if isinstance(value, Mapping) and value:
        pairs = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        pairs = list(enumerate(value))
    else:
        return {path: value}
    found: dict[str, Any] = {}
    for name, inner in pairs:
        found |= flat(inner, f"{path}.{name}" if path else str(name))
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " ".join(map(_shown, value)) or "none"
    return str(value)
