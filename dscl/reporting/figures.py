"""The charts below a table: score matrices, scores over time, confusion matrices, stored bytes, training loss."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dscl.maths.scores import ScoreRow
from dscl.monitoring.heat_map import HeatMap
from dscl.reporting.averages import mean, mean_matrix, smooth_curve
from dscl.reporting.charts import NARROW, WIDE, Axes, Line, draw_heat_map_svg, draw_legend, draw_line_chart
from dscl.reporting.groups import ReportGroup, ReportRow
from dscl.reporting.tables import BYTE_UNITS

MAX_CURVE_POINTS = 120  # of a loss curve
MAX_TICKS = 12
BEFORE_TRAINING = "before"  # label of a matrix row


def draw_charts(group: ReportGroup) -> str:
    """All charts of a table as HTML; empty if no run is complete."""
    rows = [row for row in group.rows if row.runs]
    if not rows:
        return ""
    return "".join(
        (
            _draw_score_matrices(rows),
            _draw_scores_over_time(rows),
            _draw_confusion_matrices(rows),
            _draw_stored_bytes(rows),
            _draw_training_losses(rows),
        )
    )


def _render_figure(title: str, svg: str, remark: str = "") -> str:
    small = f" <small>{escape(remark)}</small>" if remark else ""
    return f'<figure><figcaption>{escape(title)}{small}</figcaption><div class="scroll">{svg}</div></figure>'


def _render_wide_figure(title: str, lines: Sequence[Line], axes: Axes) -> str:
    return f"<figure>{''.join(draw_line_chart(title, lines, axes, size) for size in (WIDE, NARROW))}</figure>"


def _render_section(title: str, explanation: str, css_class: str, figures: Sequence[str], legend: str = "") -> str:
    if not figures:
        return ""
    return f'<h3>{title}</h3><p class="soft">{explanation}</p>{legend}<div class="{css_class}">{"".join(figures)}</div>'


def _describe_seeds(row: ReportRow) -> str:
    return f"mean of {len(row.runs)} seeds" if len(row.runs) > 1 else ""


def _task_names(row: ReportRow) -> tuple[str, ...]:
    return tuple(task["name"] for task in row.recipe["stream"])


def _mean_score_matrix(row: ReportRow) -> tuple[list[ScoreRow], bool]:
    """The mean score matrix over the seeds, and whether its first row holds the scores before training."""
    scores = [run.scores for run in row.runs if run.scores]
    zero_shot = [run_scores.zero_shot for run_scores in scores if run_scores.zero_shot is not None]
    has_zero_shot = len(zero_shot) == len(scores)
    zero_shot_rows = mean_matrix([[run_row] for run_row in zero_shot]) if has_zero_shot else []
    return [*zero_shot_rows, *mean_matrix([run_scores.matrix for run_scores in scores])], has_zero_shot


def _draw_score_matrices(rows: Sequence[ReportRow]) -> str:
    figures = []
    for row in rows:
        matrix, has_zero_shot = _mean_score_matrix(row)
        names = [*([BEFORE_TRAINING] if has_zero_shot else []), *_task_names(row)]
        shown = [i for i, scores in enumerate(matrix) if any(score is not None for score in scores)]
        # Joint training has a single measured row, after all tasks.
        row_names = [names[i] for i in shown] if len(shown) > 1 else ["at the end"]
        heat_map = HeatMap([matrix[i] for i in shown], row_names, _task_names(row))
        figures.append(_render_figure(row.label, draw_heat_map_svg(row.label, heat_map), _describe_seeds(row)))
    explanation = "Row: the scores after training this task. Column: the evaluated task. Framed: the task just trained."
    return _render_section("Score matrices", explanation, "maps", figures)


def _draw_scores_over_time(rows: Sequence[ReportRow]) -> str:
    tasks = _task_names(rows[0])
    figures = []
    for row in rows:
        matrix, has_zero_shot = _mean_score_matrix(row)
        lines = []
        for j, task in enumerate(tasks):
            points = [(i - has_zero_shot + 1.0, scores[j]) for i, scores in enumerate(matrix)]
            known = [(x, y) for x, y in points if y is not None]
            after_training = [(x, y) for x, y in known if x > j]
            name = f"{task}: {', '.join(f'{y:.3f}' for _, y in known)}"
            until_training = known[: len(known) - len(after_training) + 1]  # ends at the first point after training
            if len(until_training) > 1:
                lines.append(Line(name, until_training, j, faint=True))
            if after_training:
                first = after_training[0]
                lines.append(Line(name, after_training, j, dot=first if first[0] == j + 1 else None))
        if all(len(line.points) < 2 for line in lines):
            continue
        x_ticks = _integer_ticks(1 - has_zero_shot, len(tasks))
        svg = draw_line_chart(row.label, lines, Axes(x_ticks, "tasks trained", y_max=1.0))
        figures.append(_render_figure(row.label, svg, _describe_seeds(row)))
    explanation = "The score of each task after each training. Dot: the task was just trained. Faint: before that."
    legend = draw_legend([(task, j) for j, task in enumerate(tasks)])
    return _render_section("Every task over time", explanation, "charts", figures, legend)


def _draw_confusion_matrices(rows: Sequence[ReportRow]) -> str:
    figures = []
    for row in rows:
        matrices = [run.scores.confusion for run in row.runs if run.scores and run.scores.confusion]
        labels = {(tuple(matrix["tasks"]), tuple(matrix["answered_by"])) for matrix in matrices}
        if not matrices or len(matrices) < len(row.runs) or len(labels) > 1:
            continue
        ((tasks, answered_by),) = labels
        columns = ["none" if name is None else name for name in answered_by]
        heat_map = HeatMap(mean_matrix([matrix["shares"] for matrix in matrices]), tasks, columns)
        figures.append(_render_figure(row.label, draw_heat_map_svg(row.label, heat_map), _describe_seeds(row)))
    explanation = "Row: the task of the prompts. Column: the task that answered them; none: the base model alone."
    return _render_section("Routing of prompts at the end", explanation, "maps", figures)


def _draw_stored_bytes(rows: Sequence[ReportRow]) -> str:
    """Each row's stored bytes over the tasks, compared with one LoRA for each task."""
    lines: list[Line] = []
    legend_entries: list[tuple[str, int | None]] = []
    reference_lines: dict[tuple[tuple[float, float], ...], Line] = {}
    for number, row in enumerate(rows):
        stored = _task_end_means(row, "capacity_bytes")
        if stored:
            lines.append(Line(f"{row.label}: {_format_values(stored)}", stored, number))
            legend_entries.append((row.label, number))
        reference = _task_end_means(row, "lora_per_task_bytes")
        if reference:
            reference_lines[tuple(reference)] = Line(f"one LoRA a task: {_format_values(reference)}", reference, None)
    if not lines:
        return ""
    lines += reference_lines.values()
    legend_entries += [("one LoRA a task", None)] * bool(reference_lines)
    largest = max(y for line in lines for _, y in line.points)
    unit, unit_bytes = next(((name, size) for name, size in BYTE_UNITS if largest >= size), ("B", 1))
    scaled = [Line(line.name, [(x, y / unit_bytes) for x, y in line.points], line.colour) for line in lines]
    x_ticks = _integer_ticks(1, len(_task_names(rows[0])))
    figure = _render_wide_figure("Bytes stored for the tasks", scaled, Axes(x_ticks, "tasks trained", unit))
    legend = draw_legend(legend_entries)
    return _render_section("Storage for the tasks", "Bytes in addition to the model.", "single", [figure], legend)


def _integer_ticks(first: int, last: int) -> list[tuple[float, str]]:
    """At most MAX_TICKS ticks (position, label) at whole numbers."""
    return [(x, f"{x}") for x in range(first, last + 1, -(-(last - first + 1) // MAX_TICKS))]


def _task_end_means(row: ReportRow, key: str) -> list[tuple[float, float]]:
    """(tasks trained, mean over the seeds) of a metric that was recorded at the end of tasks."""
    means = [mean([run.metrics.last_records.get(task, {}).get(key) for run in row.runs]) for task in _task_names(row)]
    return [(i, value) for i, value in enumerate(means, 1) if value is not None]


def _draw_training_losses(rows: Sequence[ReportRow]) -> str:
    numbered_runs = [(number, row, run) for number, row in enumerate(rows) for run in row.runs if run.metrics.losses]
    if not numbered_runs:
        return ""
    lines = [
        Line(
            f"{row.label}, seed {run.seed}",
            smooth_curve([loss for _, loss in run.metrics.losses], MAX_CURVE_POINTS),
            number,
        )
        for number, row, run in numbered_runs
    ]
    last_step = max(len(run.metrics.losses) for _, _, run in numbered_runs)
    boundaries = {tuple(_task_boundaries([task for task, _ in run.metrics.losses])) for _, _, run in numbered_runs}
    axes = Axes(
        [(1, "1"), (last_step, f"{last_step:,}")],
        "step",
        "loss",
        vertical_lines=boundaries.pop() if len(boundaries) == 1 else (),
    )
    explanation = (
        f"A line for each run; every point is the mean over {max(1, round(last_step / MAX_CURVE_POINTS))} steps."
    )
    legend = draw_legend([(row.label, number) for number, row in enumerate(rows)])
    figure = _render_wide_figure("Training loss", lines, axes)
    return _render_section("Training loss", explanation, "single thin", [figure], legend)


def _task_boundaries(tasks: Sequence[str]) -> list[float]:
    """The positions between two steps at which the task changes. `tasks`: the task of each step."""
    return [i + 0.5 for i in range(1, len(tasks)) if tasks[i] != tasks[i - 1]]


def _format_values(points: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{y:,.0f}" for _, y in points)
