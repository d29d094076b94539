"""A group's charts: score matrices, tasks over time, where prompts went, stored bytes, training loss."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dscl.reporting.averages import mean, mean_rows, smooth
from dscl.reporting.charts import BROAD, Line, heat_map, legend, line_chart
from dscl.reporting.groups import Group, Row
from dscl.reporting.scores import Numbers, Shares

POINTS = 120  # of a loss curve
TICKS = 12
BEFORE = "before"


def charts(group: Group) -> str:
    rows = [row for row in group.rows if row.runs]
    if not rows:
        return ""
    return "".join((_matrices(rows), _over_time(rows), _confusions(rows), _capacity(rows), _losses(rows)))


def _figure(title: str, drawn: str, said: str = "") -> str:
    small = f" <small>{escape(said)}</small>" if said else ""
    return f'<figure><figcaption>{escape(title)}{small}</figcaption><div class="scroll">{drawn}</div></figure>'


def _part(title: str, said: str, kind: str, figures: Sequence[str], above: str = "") -> str:
    if not figures:
        return ""
    return f'<h3>{title}</h3><p class="soft">{said}</p>{above}<div class="{kind}">{"".join(figures)}</div>'


def _seeds(row: Row) -> str:
    return f"mean of {len(row.runs)} seeds" if len(row.runs) > 1 else ""


def _tasks(row: Row) -> tuple[str, ...]:
    return tuple(task["name"] for task in row.recipe["stream"])


def _scored(row: Row) -> tuple[list[Numbers], bool]:
    """The mean matrix, and whether its first row is from before any training."""
    scores = [run.scores for run in row.runs if run.scores]
    before = [of.before for of in scores if of.before is not None]
    whole = len(before) == len(scores)
    rows = mean_rows([of.matrix for of in scores])
    return [*(mean_rows([[of] for of in before]) if whole else []), *rows], whole


def _matrices(rows: Sequence[Row]) -> str:
    figures = []
    for row in rows:
        matrix, before = _scored(row)
        names = [*([BEFORE] if before else []), *_tasks(row)]
        shown = [i for i, of in enumerate(matrix) if any(value is not None for value in of)]
        told = [names[i] for i in shown] if len(shown) > 1 else ["at the end"]  # where all tasks are learnt as one
        drawn = heat_map(row.label, [matrix[i] for i in shown], told, _tasks(row))
        figures.append(_figure(row.label, drawn, _seeds(row)))
    said = "A row: after training this task. A column: the score of this task; framed where it was just learnt."
    return _part("Score matrices", said, "maps", figures)


def _over_time(rows: Sequence[Row]) -> str:
    tasks = _tasks(rows[0])
    figures = []
    for row in rows:
        matrix, before = _scored(row)
        lines = []
        for j, task in enumerate(tasks):
            points = [(i - before + 1.0, of[j]) for i, of in enumerate(matrix)]
            known = [(x, y) for x, y in points if y is not None]
            since = [(x, y) for x, y in known if x > j]
            told = f"{task}: {', '.join(f'{y:.3f}' for _, y in known)}"
            until = known[: len(known) - len(since) + 1]  # up to the first of those
            if len(until) > 1:
                lines.append(Line(told, until, j, faint=True))
            if since:
                lines.append(Line(told, since, j, dot=since[0] if since[0][0] == j + 1 else None))
        if all(len(line.points) < 2 for line in lines):
            continue
        under = _counts(1 - before, len(tasks))
        figures.append(_figure(row.label, line_chart(row.label, lines, under, "tasks trained", top=1.0), _seeds(row)))
    said = "The score of each task after each training; a dot where it was learnt, faint before."
    return _part("Every task over time", said, "charts", figures, legend([(task, j) for j, task in enumerate(tasks)]))


def _confusions(rows: Sequence[Row]) -> str:
    figures = []
    for row in rows:
        found = [run.scores.confusion for run in row.runs if run.scores and run.scores.confusion]
        if not found or len(found) < len(row.runs) or len({(of.tasks, of.answered_by) for of in found}) > 1:
            continue
        shares: Shares = found[0]
        columns = ["none" if name is None else name for name in shares.answered_by]
        drawn = heat_map(row.label, mean_rows([of.values for of in found]), shares.tasks, columns)
        figures.append(_figure(row.label, drawn, _seeds(row)))
    said = "A row: the task that prompts are of. A column: the task that answered them; none: the base model did."
    return _part("Where prompts went, at the end", said, "maps", figures)


def _capacity(rows: Sequence[Row]) -> str:
    lines: list[Line] = []
    names: list[tuple[str, int | None]] = []
    others: dict[tuple[tuple[float, float], ...], Line] = {}
    for number, row in enumerate(rows):
        stored = _at_ends(row, "capacity_bytes")
        if stored:
            lines.append(Line(f"{row.label}: {_bytes(stored)}", stored, number))
            names.append((row.label, number))
        one_each = _at_ends(row, "lora_per_task_bytes")
        if one_each:
            others[tuple(one_each)] = Line(f"one LoRA a task: {_bytes(one_each)}", one_each, None)
    if not lines:
        return ""
    lines += others.values()
    names += [("one LoRA a task", None)] * bool(others)
    most = max(y for line in lines for _, y in line.points)
    unit, size = next(((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if most >= s), ("B", 1))
    scaled = [Line(of.name, [(x, y / size) for x, y in of.points], of.colour) for of in lines]
    under = _counts(1, len(_tasks(rows[0])))
    drawn = line_chart("Bytes stored for the tasks", scaled, under, "tasks trained", unit=unit, width=BROAD)
    figure = f'<figure class="scroll">{drawn}</figure>'
    return _part("What is stored for the tasks", "Bytes beside the model.", "single", [figure], legend(names))


def _counts(first: int, last: int) -> list[tuple[float, str]]:
    """Ticks at whole numbers, as many as there is room for."""
    return [(x, f"{x}") for x in range(first, last + 1, -(-(last - first + 1) // TICKS))]


def _at_ends(row: Row, name: str) -> list[tuple[float, float]]:
    """(tasks trained, mean over seeds) after every task that left this number."""
    means = [mean([run.metrics.ended.get(task, {}).get(name) for run in row.runs]) for task in _tasks(row)]
    return [(i, value) for i, value in enumerate(means, 1) if value is not None]


def _losses(rows: Sequence[Row]) -> str:
    found = [(number, row, run) for number, row in enumerate(rows) for run in row.runs if run.metrics.losses]
    if not found:
        return ""
    lines = [
        Line(f"{row.label}, seed {run.seed}", smooth([loss for _, loss in run.metrics.losses], POINTS), number)
        for number, row, run in found
    ]
    last = max(len(run.metrics.losses) for _, _, run in found)
    ends = {tuple(_ends([task for task, _ in run.metrics.losses])) for _, _, run in found}
    drawn = line_chart(
        "Training loss",
        lines,
        [(1, "1"), (last, f"{last:,}")],
        "step",
        unit="loss",
        width=BROAD,
        marks=ends.pop() if len(ends) == 1 else (),
    )
    said = f"A line for each run; every point is the mean over {max(1, round(last / POINTS))} steps."
    names: list[tuple[str, int | None]] = [(row.label, number) for number, row in enumerate(rows)]
    return _part("Training loss", said, "single thin", [f'<figure class="scroll">{drawn}</figure>'], legend(names))


def _ends(tasks: Sequence[str]) -> list[float]:
    """Between which steps one task ends and the next one begins."""
    return [i + 0.5 for i in range(1, len(tasks)) if tasks[i] != tasks[i - 1]]


def _bytes(points: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{y:,.0f}" for _, y in points)
