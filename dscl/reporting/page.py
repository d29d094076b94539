"""Render a report as one self-contained HTML file, without scripts and without network access."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from dscl.reporting import figures
from dscl.reporting.comparison import ComparisonResult
from dscl.reporting.groups import HEADING_FACTS, ReportGroup
from dscl.reporting.style import STYLE
from dscl.reporting.tables import (
    COLUMN_MEANINGS,
    PUBLISHED_NOTE,
    Report,
    Table,
    failures_table,
    format_published_table,
    format_run_counts,
    group_published_tables,
    result_tables,
    select_facts,
    table_notes,
    trials_table,
)


def render_html(report: Report) -> str:
    """The whole report as an HTML document."""
    sections = [
        *(_render_group(group, number, len(report.groups)) for number, group in enumerate(report.groups, 1)),
        *map(_render_comparison, report.comparisons),
        _render_unread(report),
        _render_column_meanings(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>dscl report</title><style>{STYLE}</style></head>\n<body><main>"
        f'<header><h1>dscl report</h1><p class="soft">{escape(format_run_counts(report))}</p>'
        f"{_render_contents(report)}</header>\n"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _render_contents(report: Report) -> str:
    """The list of tables; empty if there is only one."""
    if len(report.groups) < 2:
        return ""
    entries = (
        f'<li><a href="#table-{number}">{escape(group.facts["tasks"])}</a>{escape(_short_distinctions(group))}</li>'
        for number, group in enumerate(report.groups, 1)
    )
    return f'<ol class="toc soft">{"".join(entries)}</ol>'


def _short_distinctions(group: ReportGroup) -> str:
    """The facts in which the table differs from others, without long values."""
    return "".join(f" · {name} {value}" for name, value in group.distinguishing_facts.items() if len(value) < 40)


def _render_group(group: ReportGroup, number: int, num_groups: int) -> str:
    flagged_facts = [
        (*fact, fact[0] in group.distinguishing_facts)
        for fact in select_facts(group, [*HEADING_FACTS, *group.distinguishing_facts])
    ]
    entries = (
        f"<div{' class=apart' if is_distinguishing else ''}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value, is_distinguishing in dict.fromkeys(flagged_facts)
    )
    scores, *costs = map(_render_table, result_tables(group))
    details = figures.draw_charts(group)
    if group.is_search:  # runs that only served to choose settings: their details are folded
        details = f"<details><summary>Costs and charts</summary>{''.join(costs)}{details}</details>"
        costs = []
    return (
        f'<section id="table-{number}"><p class="number">Table {number} of {num_groups}</p>'
        f'<h2>{escape(group.facts["tasks"])}</h2><dl class="facts">{"".join(entries)}</dl>'
        f"{scores}{''.join(costs)}{_render_notes(table_notes(group))}{_render_published(group)}{details}</section>\n"
    )


def _render_published(group: ReportGroup) -> str:
    tables = "".join(
        f'<div class="published"><h3>Published: <a href="{escape(table.link)}">{escape(table.source)}</a></h3>'
        f'<p class="soft">{escape(table.setting)}. {escape(PUBLISHED_NOTE)}</p>'
        f"{_render_table(format_published_table(table))}</div>"
        for table in group_published_tables(group)
    )
    return f'<div class="papers">{tables}</div>' if tables else ""


def _render_comparison(comparison: ComparisonResult) -> str:
    parts = [f"<h2>Comparison {escape(str(comparison.folder))}</h2>"]
    if comparison.problem:
        parts.append(_render_notes([comparison.problem]))
    else:
        parts.append(f'<p class="soft">Stream: {escape(comparison.stream)}</p>')
        if comparison.has_search:
            parts.append(f'<h3>Learning rates tried</h3><p class="soft">Chosen: {escape(comparison.rule)}.</p>')
            parts.append(_render_table(trials_table(comparison)))
        if comparison.deviations:
            parts.append(f"<h3>Differences between the rows' budgets</h3>{_render_notes(comparison.deviations)}")
        if comparison.failed_runs:
            parts.append(f"<h3>Failed runs</h3>{_render_table(failures_table(comparison))}")
    return f"<section>{''.join(parts)}</section>\n"


def _render_unread(report: Report) -> str:
    if not report.unread:
        return ""
    problems = (f"{run.folder}: {run.problem}" for run in report.unread)
    return f"<section><h2>Not read</h2>{_render_notes(problems)}</section>\n"


def _render_column_meanings(report: Report) -> str:
    heads = {name for group in report.groups for table in result_tables(group) for name in table.head}
    entries = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>"
        for name, meaning in COLUMN_MEANINGS.items()
        if name in heads
    )
    return f'<section><h2>What the columns mean</h2><dl class="words">{entries}</dl></section>\n' if entries else ""


def _render_table(table: Table) -> str:
    head = "".join(f'<th scope="col"{_render_tooltip(name)}>{escape(name)}</th>' for name in table.head)
    body = "".join(f"<tr>{_render_cells(row)}</tr>" for row in table.rows)
    kind = ' class="words"' if table.is_text else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _render_tooltip(name: str) -> str:
    return f' title="{escape(COLUMN_MEANINGS[name])}"' if name in COLUMN_MEANINGS else ""


def _render_cells(row: Sequence[str]) -> str:
    label, *values = row
    return f'<th scope="row">{_shrink_settings(escape(label))}</th>' + "".join(
        f"<td>{_shrink_deviation(escape(value))}</td>" for value in values
    )


def _shrink_settings(label: str) -> str:
    """Show the settings of a row's label in small type."""
    name, separator, settings = label.partition(" (")
    return f"{name} <small>{settings.removesuffix(')')}</small>" if separator else name


def _shrink_deviation(cell: str) -> str:
    """Show the standard deviation of a cell in small type."""
    mean, separator, deviation = cell.partition(" ± ")
    return f"{mean} <small>± {deviation}</small>" if separator else cell


def _render_notes(lines: Iterable[str]) -> str:
    entries = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{entries}</ul>' if entries else ""
