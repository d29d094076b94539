"""Render a report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from dscl.reporting.comparison import ComparisonResult
from dscl.reporting.groups import HEADING_FACTS, ReportGroup
from dscl.reporting.tables import (
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


def render_markdown(report: Report) -> str:
    """The whole report as a Markdown document."""
    blocks = ["# dscl report", escape_markdown(format_run_counts(report))]
    for number, group in enumerate(report.groups, 1):
        blocks += _render_group(group, number)
    for comparison in report.comparisons:
        blocks += _render_comparison(comparison)
    if report.unread:
        blocks += ["## Not read", _render_list(f"{run.folder}: {run.problem}" for run in report.unread)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _render_group(group: ReportGroup, number: int) -> Iterator[str]:
    yield f"## {number}. {escape_markdown(group.facts['tasks'])}"
    yield _render_facts(select_facts(group, HEADING_FACTS))
    if group.distinguishing_facts:
        yield f"Unlike the other tables: {_render_facts(list(group.distinguishing_facts.items()))}"
    yield from map(_render_table, result_tables(group))
    yield _render_list(table_notes(group))
    for table in group_published_tables(group):
        source, setting = escape_markdown(table.source), escape_markdown(table.setting)
        yield f"Published: {source}, {table.link}. {setting}. {PUBLISHED_NOTE}"
        yield _render_table(format_published_table(table))


def _render_comparison(comparison: ComparisonResult) -> Iterator[str]:
    yield f"## Comparison {escape_markdown(str(comparison.folder))}"
    if comparison.problem:
        yield _render_list([comparison.problem])
        return
    yield f"Stream: {escape_markdown(comparison.stream)}"
    if comparison.has_search:
        yield f"Learning rates tried; chosen: {escape_markdown(comparison.rule)}."
        yield _render_table(trials_table(comparison))
    if comparison.deviations:
        yield "Differences between the rows' budgets:"
        yield _render_list(comparison.deviations)
    if comparison.failed_runs:
        yield "Failed runs:"
        yield _render_table(failures_table(comparison))


def _render_facts(pairs: Sequence[tuple[str, str]]) -> str:
    return " · ".join(f"{escape_markdown(name)}: {escape_markdown(value)}" for name, value in pairs)


def _render_table(table: Table) -> str:
    separator = ("---", *("---" if table.is_text else "---:" for _ in table.head[1:]))
    rows = [list(map(escape_markdown, table.head)), separator, *(map(escape_markdown, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _render_list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape_markdown(line)}" for line in lines)


def escape_markdown(text: str) -> str:
    """Escape all Markdown syntax and join the lines, so that the text is shown as it is."""
    text = re.sub(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
