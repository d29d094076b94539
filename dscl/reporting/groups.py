"""Group runs into rows, whose runs differ only in the seed, and rows into tables, whose rows may be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dscl.reporting.runs import RunRecord
from dscl.utils.formatting import truncate_middle

# Recipe keys that belong to a single run. Runs that differ in no other key form one row.
RUN_ONLY_KEYS = ("seed", "run_dir", "observe", "checkpoint", "data.cache_dir")
# The facts that every table's heading shows. The other facts are shown only if tables differ in them.
HEADING_FACTS = (
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
MAX_VALUE_WIDTH = 60  # columns of a setting's value in a label


@dataclass
class ReportRow:
    """Runs with the same settings and different seeds."""

    name: str  # the row's name in a comparison, else the method's name
    recipe: Mapping[str, Any]  # of its first run
    runs: list[RunRecord] = field(default_factory=list)  # complete runs, one for each seed
    excluded: list[tuple[RunRecord, str]] = field(default_factory=list)  # runs left out of averages, and the reason
    label: str = ""  # the name, with the settings in which it differs from other rows of the same name


@dataclass
class ReportGroup:
    """The rows of one table. They have equal tasks, samples, budgets and evaluation, so they may be compared."""

    tasks: tuple[str, ...]
    facts: Mapping[str, str]  # what the rows have in common: name → value in words
    rows: list[ReportRow]
    distinguishing_facts: dict[str, str] = field(default_factory=dict)  # facts that other groups do not share

    @property
    def is_search(self) -> bool:
        """Whether the runs were evaluated on the dev split, to choose settings."""
        return self.facts["split"] == "dev"


def group_runs(runs: Iterable[RunRecord]) -> list[ReportGroup]:
    """Group runs into tables, in the order of their first runs. Tables of the test split come first."""
    groups: list[ReportGroup] = []
    # A task's default metric is recorded only in scores.json, so rows without a scores.json are assigned last.
    for row in sorted(_collect_rows(runs), key=lambda row: _metric_names(row) is None):
        facts = comparability_facts(row.recipe, _metric_names(row))
        for group in groups:
            if all(facts.get(name, value) == value for name, value in group.facts.items()):
                group.rows.append(row)
                break
        else:
            groups.append(ReportGroup(tuple(task["name"] for task in row.recipe["stream"]), facts, [row]))
    groups.sort(key=lambda group: group.is_search)
    for group in groups:
        _label_rows(group.rows)
        group.distinguishing_facts = _find_distinguishing_facts(group, groups)
    return groups


def _collect_rows(runs: Iterable[RunRecord]) -> list[ReportRow]:
    rows: dict[tuple[str, str], ReportRow] = {}
    for run in runs:
        name = run.row or run.recipe["method"]["name"]
        key = name, json.dumps(row_settings(run.recipe), sort_keys=True, default=str)
        row = rows.setdefault(key, ReportRow(name, run.recipe))
        same_seed = next((other for other in row.runs if other.seed == run.seed), None)
        if run.problem:
            row.excluded.append((run, run.problem))
        elif same_seed is not None:
            row.excluded.append((run, f"seed {run.seed} again; the averages use {same_seed.folder}"))
        else:
            row.runs.append(run)
    for row in rows.values():
        row.runs.sort(key=lambda run: str(run.seed).zfill(20))
    return list(rows.values())


def row_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the runs of a row share, by dotted key; a null is the same as a missing key."""
    unused_split = "test" if recipe["evaluate"].get("split") == "dev" else "dev"  # not evaluated
    return {
        name: value
        for name, value in flatten_mapping(recipe).items()
        if value is not None
        and not any(name == key or name.startswith(key + ".") for key in RUN_ONLY_KEYS)
        and not (name.startswith("stream.") and name.endswith(f".{unused_split}_limit"))
    }


def _metric_names(row: ReportRow) -> tuple[str, ...] | None:
    """Each task's metric, as the first run with scores recorded them."""
    runs = [*row.runs, *(run for run, _ in row.excluded)]
    return next((run.scores.metrics for run in runs if run.scores), None)


def comparability_facts(recipe: Mapping[str, Any], metrics: Sequence[str] | None) -> dict[str, str]:
    """The facts that runs must share to be comparable, in words; without the metric if it is not known."""
    stream, train, evaluate, model = (recipe[name] for name in ("stream", "train", "evaluate", "model"))
    names = [task["name"] for task in stream]
    metrics = metrics or [task.get("metric") for task in stream]
    split = evaluate.get("split") or "test"
    mode = evaluate.get("mode") or "rank"

    def format_per_task(values: Sequence[Any]) -> str:
        """A single value if all tasks have the same one."""
        formatted = list(map(_format_value, values))
        if len(set(formatted)) == 1:
            return formatted[0]
        return ", ".join(f"{name} {value}" for name, value in zip(names, formatted, strict=True))

    def format_task_key(key: str, default: Any = None) -> str:
        return format_per_task([default if task.get(key) is None else task[key] for task in stream])

    return {
        "tasks": " → ".join(names),
        "model": str(model.get("name") or f"fresh ({_format_value(model.get('shape'))})"),
        "tokenizer": _format_value(model.get("tokenizer")),
        "data": format_task_key("path"),
        **{name: format_task_key(name) for name in ("format", "template", "labels", "columns", "chat")},
        "training samples": format_task_key("train_limit", "all"),
        "dev share": format_task_key("dev_share"),
        "epochs": format_task_key("epochs", train.get("epochs")),
        "batch": _format_value(train.get("global_batch")),
        "length": _format_value(train.get("max_length")),
        **{
            name: _format_value(train.get(name))
            for name in ("packing", "schedule", "warmup", "weight_decay", "grad_clip")
        },
        "bad records": _format_value((recipe.get("data") or {}).get("bad_records")),
        "precision": _format_value(train.get("precision")),
        "split": split,
        "samples scored": format_task_key(f"{split}_limit", "all"),
        **({"metric": format_per_task(metrics)} if all(metrics) else {}),
        "answers": "ranked" if mode == "rank" else f"generated, {_format_value(evaluate.get('max_new_tokens'))} tokens",
    }


def _find_distinguishing_facts(group: ReportGroup, groups: Sequence[ReportGroup]) -> dict[str, str]:
    """The facts in which this group differs from another one.

    Groups of other tasks, or of another order, naturally differ in their data. So the facts outside the heading are
    compared only with groups of the same tasks.
    """
    others = [other for other in groups if other is not group]
    same_tasks = [other for other in others if other.tasks == group.tasks]
    return {
        name: value
        for name, value in group.facts.items()
        if name != "tasks"
        and any(other.facts.get(name, value) != value for other in (others if name in HEADING_FACTS else same_tasks))
    }


def _label_rows(rows: Sequence[ReportRow]) -> None:
    """Label each row with the settings in which it differs from rows of the same name.

    The learning rate is added if the rows differ in it at all.
    """
    settings = {id(row): row_settings(row.recipe) for row in rows}
    learning_rates = {str(row.recipe["train"].get("lr")) for row in rows}
    for row in rows:
        same_name = [settings[id(other)] for other in rows if other.name == row.name]
        own = settings[id(row)]
        names = [name for name in own if _settings_differ(name, same_name, count_missing=False)]
        for other in same_name:  # rows that differ only in settings that one of them lacks
            if other is not own and all(own.get(name) == other.get(name) for name in names):
                names += [name for name in {**own, **other} if _settings_differ(name, [own, other], count_missing=True)]
        names = [name for name in dict.fromkeys(names) if name != "train.lr"]
        names += ["train.lr"] * (len(learning_rates) > 1)
        details = ", ".join(
            f"{_shorten_key(name)} {truncate_middle(_format_value(own.get(name)), MAX_VALUE_WIDTH)}" for name in names
        )
        row.label = f"{row.name} ({details})" if details else row.name


def _settings_differ(name: str, settings: Sequence[Mapping[str, Any]], count_missing: bool) -> bool:
    """Whether the rows' values of a setting differ. A missing value counts as None, or does not count at all."""
    values = [row_setting.get(name) for row_setting in settings if count_missing or name in row_setting]
    return any(value != values[0] for value in values)


def _shorten_key(name: str) -> str:
    if name.startswith("method."):  # method.tune.name: which part was selected
        return name.removeprefix("method.").removesuffix(".name")
    return name.removeprefix("train.")


def flatten_mapping(value: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested mappings, and lists of mappings, to dotted keys; other lists are values."""
    if isinstance(value, Mapping) and value:
        pairs = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        pairs = list(enumerate(value))
    else:
        return {path: value}
    flattened: dict[str, Any] = {}
    for name, inner in pairs:
        flattened |= flatten_mapping(inner, f"{path}.{name}" if path else str(name))
    return flattened


def _format_value(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_format_value(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " ".join(map(_format_value, value)) or "none"
    return str(value)
