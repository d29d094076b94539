"""What a report says, as tables and lines of plain text: both pages show these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dscl.reporting.averages import Figure, figure, mean
from dscl.reporting.comparison import Comparison
from dscl.reporting.groups import Group, Row
from dscl.reporting.published import Published, published
from dscl.reporting.runs import Run
from dscl.reporting.scores import SUMMARY
from dscl.utils.formatting import count, duration

NONE = "-"
MANY = 5  # seeds that are not listed one by one


@dataclass(frozen=True)
class Report:
    groups: Sequence[Group]
    comparisons: Sequence[Comparison]
    unread: Sequence[Run]
    runs: int


@dataclass(frozen=True)
class Table:
    """Its first column names the rows, the others hold numbers unless `words` says so."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: bool = False


MEANINGS = {
    "OP": "mean score over the tasks at the end",
    "BWT": "mean change of the earlier tasks since each was learnt; not clipped",
    "FWT": "mean gain of a task before its own training",
    "forgetting": "mean fall of the earlier tasks from their best",
    "OP, task given": "OP where every prompt comes with its task",
    "routed right": "prompts that their own task answered, at the end, mean over the tasks",
    "held-out loss": "mean loss on text of no task, before training → at the end",
    "tokens": "that training passed through the model, repetitions included",
    "training": "time of the training steps, without evaluation",
    "peak memory": "most bytes in use on a device",
    "trainable": "parameters that train at once",
    "stored": "bytes kept for the tasks beside the model",
    "to decide": "bytes of those that find a prompt's task, kept beside that",
}

PUBLISHED = "Another model and budget: for orientation, not to be compared figure by figure."


def about(report: Report) -> str:
    left = sum(len(row.aside) for group in report.groups for row in group.rows) + len(report.unread)
    tables = f"{len(report.groups)} table{'s' * (len(report.groups) != 1)}"
    told = f"{report.runs} run{'s' * (report.runs != 1)} in {tables}"
    return f"{told}; {left} not averaged, said below why" if left else told


def results(group: Group) -> list[Table]:
    """What rows came to, and what they took; a column that no row has is left out, but for the four summaries."""
    scores: dict[str, Callable[[Row], str]] = {
        "seeds": _seeds,
        **{name: _column(_summary(name)) for name in SUMMARY},
        "OP, task given": _column(lambda run: run.scores.given.get("OP") if run.scores else None),
        "routed right": _column(lambda run: mean(run.scores.routed) if run.scores else None),
        "held-out loss": _heldout,
    }
    costs: dict[str, Callable[[Row], str]] = {
        "tokens": _column(lambda run: run.metrics.tokens, count),
        "training": _column(lambda run: run.metrics.seconds, duration),
        "peak memory": _column(lambda run: run.metrics.peak, size),
        "trainable": _column(lambda run: run.metrics.trainable, count),
        "stored": _column(lambda run: at_end(run, "capacity_bytes"), size),
        "to decide": _column(lambda run: at_end(run, "deciding_bytes"), size),
    }
    return [table for table in (_table(group, scores), _table(group, costs)) if len(table.head) > 1]


def _table(group: Group, columns: Mapping[str, Callable[[Row], str]]) -> Table:
    cells = {name: [column(row) for row in group.rows] for name, column in columns.items()}
    head = [name for name in columns if name in ("seeds", *SUMMARY) or set(cells[name]) != {NONE}]
    rows = ((row.label, *(cells[name][i] for name in head)) for i, row in enumerate(group.rows))
    return Table(("method", *head), tuple(rows))


def notes(group: Group) -> list[str]:
    """What a reader must know of this table."""
    found = [
        f"{run.folder}, {row.label}, seed {run.seed}: {why}; not averaged"
        for row in group.rows
        for run, why in row.aside
    ]
    for row in group.rows:
        found += [f"{run.folder}: {run.metrics.trouble}" for run in row.runs if run.metrics.trouble]
    texts = {str(row.recipe["evaluate"].get("heldout")) for row in group.rows if _heldout(row) != NONE}
    if len(texts) > 1:
        found.append(f"held-out losses are of different texts: {', '.join(sorted(texts))}")
    counts = {len(row.runs) for row in group.rows if row.runs}
    if len(counts) > 1:
        found.append("rows are means over different numbers of seeds")
    if max(counts, default=0) > 1:
        found.append("± is the standard deviation over seeds (of the sample)")
    return found


def facts(group: Group, names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, group.facts[name]) for name in names if name in group.facts]


def papers(group: Group) -> list[Published]:
    """What was published on the same benchmark, which is of the test split."""
    return [] if group.searching else published(group.tasks)


def published_table(table: Published) -> Table:
    def shown(percent: float | None) -> str:
        return NONE if percent is None else f"{percent / 100:.{table.decimals + 2}f}"

    rows = ((method, shown(op), shown(bwt)) for method, op, bwt in table.figures)
    return Table(("published", "OP", "BWT"), tuple(rows))


def trials(comparison: Comparison) -> Table:
    """All rates that were tried and what dev said of them."""
    rows = []
    for name, tried in (comparison.trials or {}).items():
        for trial in tried:
            said = [(trial.summary or {}).get(of) for of in ("OP", "BWT")]
            shown = (NONE if value is None else score(value) for value in said)
            rows.append((name, f"{trial.rate:g}", *shown, "yes" if trial.chosen else ""))
    return Table(("row", "lr", "OP on dev", "BWT on dev", "chosen"), tuple(rows))


def failures(comparison: Comparison) -> Table:
    rows = ((failed.run, failed.status, failed.said, failed.log) for failed in comparison.failed)
    return Table(("failed run", "status", "said", "log"), tuple(rows), words=True)


def at_end(run: Run, name: str) -> float | None:
    """A number of the last task's end."""
    tasks = run.scores.tasks if run.scores else ()
    return run.metrics.ended.get(tasks[-1], {}).get(name) if tasks else None


def score(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"


def size(value: float) -> str:
    """Of bytes: 870 B, 3.4 KiB, 1.2 GiB."""
    for unit, of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= of:
            return f"{value / of:.1f} {unit}"
    return f"{value:.0f} B"


def _seeds(row: Row) -> str:
    if not row.runs:
        return "none finished"
    listed = f" ({', '.join(str(run.seed) for run in row.runs)})" if len(row.runs) <= MANY else ""
    return f"{len(row.runs)}{listed}"


def _summary(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.scores.summary[name] if run.scores else None


def _column(value: Callable[[Run], float | None], shown: Callable[[float], str] | None = None) -> Callable[[Row], str]:
    """The mean over a row's runs; with its deviation where it is a score, which has no `shown` of its own."""

    def column(row: Row) -> str:
        found = figure([value(run) for run in row.runs])
        if found is None:
            return NONE
        return shown(found.mean) if shown else _with_deviation(found)

    return column


def _with_deviation(found: Figure) -> str:
    return score(found.mean) + ("" if found.std is None else f" ± {score(found.std)}")


def _heldout(row: Row) -> str:
    losses = [run.scores.heldout if run.scores else () for run in row.runs]
    if not losses or not all(losses):
        return NONE
    before, after = (figure([of[place] for of in losses]) for place in (0, -1))
    return f"{score(before.mean)} → {_with_deviation(after)}" if before and after else NONE
