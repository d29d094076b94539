"""The content of a report as tables and lines of plain text, which the HTML and the Markdown renderer share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dscl.maths.scores import SUMMARY_KEYS
from dscl.reporting.averages import MeanStd, mean, mean_and_std
from dscl.reporting.comparison import ComparisonResult
from dscl.reporting.groups import ReportGroup, ReportRow
from dscl.reporting.published import PublishedTable, find_published_tables
from dscl.reporting.runs import RunRecord
from dscl.utils.formatting import format_count, format_duration

BYTE_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
MISSING = "-"  # a cell without a value
MAX_LISTED_SEEDS = 5  # with more seeds, a row shows only their number


@dataclass(frozen=True)
class Report:
    """Everything that a report shows."""

    groups: Sequence[ReportGroup]
    comparisons: Sequence[ComparisonResult]
    unread: Sequence[RunRecord]  # runs whose recipe cannot be read
    num_runs: int


@dataclass(frozen=True)
class Table:
    """A table of formatted cells. The first column names the rows; the others hold numbers unless `is_text` is set."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_text: bool = False


COLUMN_MEANINGS = {
    "OP": "mean score over the tasks at the end",
    "BWT": "mean change of the earlier tasks since each was learnt; not clipped",
    "FWT": "mean gain of a task before its own training",
    "forgetting": "mean fall of the earlier tasks from their best",
    "OP, task given": "OP if the model is told each prompt's task",
    "routing accuracy": "share of prompts answered by their own task, at the end, mean over the tasks",
    "held-out loss": "mean loss on text of no task, before training → at the end",
    "tokens": "number of training tokens, repetitions included",
    "training": "time of the training steps, without evaluation",
    "peak memory": "largest number of bytes in use on a device",
    "trainable": "largest number of parameters that train at the same time",
    "stored": "bytes stored for the tasks in addition to the model, without the router",
    "router": "bytes stored to find each prompt's task",
}

PUBLISHED_NOTE = "Another model and another budget: for orientation only, not for a direct comparison."


def format_run_counts(report: Report) -> str:
    """The report's first line: how many runs and tables there are, and how many runs are left out of averages."""
    num_excluded = sum(len(row.excluded) for group in report.groups for row in group.rows) + len(report.unread)
    tables = f"{len(report.groups)} table{'s' * (len(report.groups) != 1)}"
    overview = f"{report.num_runs} run{'s' * (report.num_runs != 1)} in {tables}"
    return f"{overview}; {num_excluded} not averaged, for the reasons below" if num_excluded else overview


def result_tables(group: ReportGroup) -> list[Table]:
    """The group's tables of scores and of costs. Columns without any value are left out, except the summaries."""
    scores: dict[str, Callable[[ReportRow], str]] = {
        "seeds": _format_seeds,
        **{name: _mean_column(_summary_getter(name)) for name in SUMMARY_KEYS},
        "OP, task given": _mean_column(lambda run: run.scores.oracle_summary["OP"] if run.scores else None),
        "routing accuracy": _mean_column(lambda run: mean(run.scores.final_routing_accuracy) if run.scores else None),
        "held-out loss": _format_heldout_losses,
    }
    costs: dict[str, Callable[[ReportRow], str]] = {
        "tokens": _mean_column(lambda run: run.metrics.tokens, format_count),
        "training": _mean_column(lambda run: run.metrics.seconds, format_duration),
        "peak memory": _mean_column(lambda run: run.metrics.peak_memory, format_bytes),
        "trainable": _mean_column(lambda run: run.metrics.trainable_parameters, format_count),
        "stored": _mean_column(lambda run: last_task_metric(run, "capacity_bytes"), format_bytes),
        "router": _mean_column(lambda run: last_task_metric(run, "router_bytes"), format_bytes),
    }
    return [table for table in (_build_table(group, scores), _build_table(group, costs)) if len(table.head) > 1]


def _build_table(group: ReportGroup, columns: Mapping[str, Callable[[ReportRow], str]]) -> Table:
    cells = {name: [column(row) for row in group.rows] for name, column in columns.items()}
    head = [name for name in columns if name in ("seeds", *SUMMARY_KEYS) or set(cells[name]) != {MISSING}]
    rows = ((row.label, *(cells[name][i] for name in head)) for i, row in enumerate(group.rows))
    return Table(("method", *head), tuple(rows))


def table_notes(group: ReportGroup) -> list[str]:
    """Remarks below a table: runs that are left out and why, damaged files, unequal held-out texts or seeds."""
    notes = [
        f"{run.folder}, {row.label}, seed {run.seed}: {reason}; not averaged"
        for row in group.rows
        for run, reason in row.excluded
    ]
    for row in group.rows:
        notes += [f"{run.folder}: {run.metrics.problem}" for run in row.runs if run.metrics.problem]
    texts = {str(row.recipe["evaluate"].get("heldout")) for row in group.rows if _format_heldout_losses(row) != MISSING}
    if len(texts) > 1:
        notes.append(f"held-out losses are of different texts: {', '.join(sorted(texts))}")
    counts = {len(row.runs) for row in group.rows if row.runs}
    if len(counts) > 1:
        notes.append("rows are means over different numbers of seeds")
    if max(counts, default=0) > 1:
        notes.append("± is the sample standard deviation over seeds")
    return notes


def select_facts(group: ReportGroup, names: Sequence[str]) -> list[tuple[str, str]]:
    """The named facts of a group that are known, as (name, value)."""
    return [(name, group.facts[name]) for name in names if name in group.facts]


def group_published_tables(group: ReportGroup) -> list[PublishedTable]:
    """Published results on the group's benchmark; none for runs on the dev split."""
    return [] if group.is_search else find_published_tables(group.tasks)


def format_published_table(table: PublishedTable) -> Table:
    """Published results as shares in 0…1, like the measured ones."""

    def format_percent(percent: float | None) -> str:
        return MISSING if percent is None else f"{percent / 100:.{table.decimals + 2}f}"

    rows = ((method, format_percent(op), format_percent(bwt)) for method, op, bwt in table.results)
    return Table(("published", "OP", "BWT"), tuple(rows))


def trials_table(comparison: ComparisonResult) -> Table:
    """All learning rates that were tried, with their scores on the dev split."""
    rows = []
    for name, row_trials in (comparison.trials or {}).items():
        for trial in row_trials:
            values = [(trial.summary or {}).get(key) for key in ("OP", "BWT")]
            cells = (MISSING if value is None else format_score(value) for value in values)
            rows.append((name, f"{trial.rate:g}", *cells, "yes" if trial.chosen else ""))
    return Table(("row", "lr", "OP on dev", "BWT on dev", "chosen"), tuple(rows))


def failures_table(comparison: ComparisonResult) -> Table:
    rows = ((run.run, run.status, run.message, run.log) for run in comparison.failed_runs)
    return Table(("failed run", "status", "message", "log"), tuple(rows), is_text=True)


def last_task_metric(run: RunRecord, name: str) -> float | None:
    """A metric of the last training step of the last task."""
    tasks = run.scores.tasks if run.scores else ()
    return run.metrics.last_records.get(tasks[-1], {}).get(name) if tasks else None


def format_score(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # + 0.0 turns -0.0 into 0.0


def format_bytes(value: float) -> str:
    """For example 870 B, 3.4 KiB or 1.2 GiB."""
    for unit, unit_bytes in BYTE_UNITS:
        if value >= unit_bytes:
            return f"{value / unit_bytes:.1f} {unit}"
    return f"{value:.0f} B"


def _format_seeds(row: ReportRow) -> str:
    if not row.runs:
        return "none finished"
    listed = f" ({', '.join(str(run.seed) for run in row.runs)})" if len(row.runs) <= MAX_LISTED_SEEDS else ""
    return f"{len(row.runs)}{listed}"


def _summary_getter(name: str) -> Callable[[RunRecord], float | None]:
    return lambda run: run.scores.summary[name] if run.scores else None


def _mean_column(
    get_value: Callable[[RunRecord], float | None], format_mean: Callable[[float], str] | None = None
) -> Callable[[ReportRow], str]:
    """A function that formats the mean over a row's runs.

    Without `format_mean` the value is a score, which is shown with its standard deviation.
    """

    def format_cell(row: ReportRow) -> str:
        result = mean_and_std([get_value(run) for run in row.runs])
        if result is None:
            return MISSING
        return format_mean(result.mean) if format_mean else _format_mean_and_std(result)

    return format_cell


def _format_mean_and_std(value: MeanStd) -> str:
    return format_score(value.mean) + ("" if value.std is None else f" ± {format_score(value.std)}")


def _format_heldout_losses(row: ReportRow) -> str:
    """The mean loss before training and at the end."""
    losses = [run.scores.heldout_losses if run.scores else [] for run in row.runs]
    if not losses or not all(losses):
        return MISSING
    first, last = (mean_and_std([run_losses[position] for run_losses in losses]) for position in (0, -1))
    return f"{format_score(first.mean)} → {_format_mean_and_std(last)}" if first and last else MISSING
