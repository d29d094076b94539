"""The report's tables and notes in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from dscl.reporting.comparison import Comparison
from dscl.reporting.groups import HEADING, Group
from dscl.reporting.tables import (
    PUBLISHED,
    Report,
    Table,
    about,
    facts,
    failures,
    notes,
    papers,
    published_table,
    results,
    trials,
)


def markdown(report: Report) -> str:
    blocks = ["# dscl report", plain(about(report))]
    for number, group in enumerate(report.groups, 1):
        blocks += _group(group, number)
    for comparison in report.comparisons:
        blocks += _comparison(comparison)
    if report.unread:
        blocks += ["## Not read", _list(f"{run.folder}: {run.trouble}" for run in report.unread)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _group(group: Group, number: int) -> Iterator[str]:
    yield f"## {number}. {plain(group.facts['tasks'])}"
    yield _said(facts(group, HEADING))
    if group.apart:
        yield f"Unlike the other tables: {_said(list(group.apart.items()))}"
    yield from map(_table, results(group))
    yield _list(notes(group))
    for table in papers(group):
        yield f"Published: {plain(table.source)}, {table.link}. {plain(table.setting)}. {PUBLISHED}"
        yield _table(published_table(table))


def _comparison(comparison: Comparison) -> Iterator[str]:
    yield f"## Comparison {plain(str(comparison.folder))}"
    if comparison.trouble:
        yield _list([comparison.trouble])
        return
    yield f"Stream: {plain(comparison.stream)}"
    if comparison.searched:
        yield f"Learning rates tried; chosen: {plain(comparison.rule)}."
        yield _table(trials(comparison))
    if comparison.deviations:
        yield "Where a row was not given what the others were:"
        yield _list(comparison.deviations)
    if comparison.failed:
        yield "Failed runs:"
        yield _table(failures(comparison))


def _said(pairs: Sequence[tuple[str, str]]) -> str:
    return " · ".join(f"{plain(name)}: {plain(value)}" for name, value in pairs)


def _table(table: Table) -> str:
    rule = ("---", *("---" if table.words else "---:" for _ in table.head[1:]))
    rows = [list(map(plain, table.head)), rule, *(map(plain, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {plain(line)}" for line in lines)


def plain(text: str) -> str:
    """As text that Markdown takes for nothing else, on one line."""
    text = re.sub(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
