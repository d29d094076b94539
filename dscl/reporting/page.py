"""The report as one HTML file: no scripts, no network, nothing beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from dscl.reporting import drawings
from dscl.reporting.comparison import Comparison
from dscl.reporting.groups import HEADING, Group
from dscl.reporting.style import STYLE
from dscl.reporting.tables import (
    MEANINGS,
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


def page(report: Report) -> str:
    sections = [
        *(_group(group, number, len(report.groups)) for number, group in enumerate(report.groups, 1)),
        *map(_comparison, report.comparisons),
        _unread(report),
        _meanings(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>dscl report</title><style>{STYLE}</style></head>\n<body><main>"
        f'<header><h1>dscl report</h1><p class="soft">{escape(about(report))}</p>{_contents(report)}</header>\n'
        f"{''.join(sections)}</main></body></html>\n"
    )


def _contents(report: Report) -> str:
    if len(report.groups) < 2:
        return ""
    entries = (
        f'<li><a href="#table-{number}">{escape(group.facts["tasks"])}</a>{escape(_told(group))}</li>'
        for number, group in enumerate(report.groups, 1)
    )
    return f'<ol class="toc soft">{"".join(entries)}</ol>'


def _told(group: Group) -> str:
    return "".join(f" · {name} {value}" for name, value in group.apart.items() if len(value) < 40)


def _group(group: Group, number: int, of: int) -> str:
    told = [(*fact, fact[0] in group.apart) for fact in facts(group, [*HEADING, *group.apart])]
    entries = (
        f"<div{' class=apart' if apart else ''}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value, apart in dict.fromkeys(told)
    )
    scores, *costs = map(_table, results(group))
    more = drawings.charts(group)
    if group.searching:  # these runs only chose settings for others
        more = f"<details><summary>What these runs took, and charts</summary>{''.join(costs)}{more}</details>"
        costs = []
    return (
        f'<section id="table-{number}"><p class="number">Table {number} of {of}</p>'
        f'<h2>{escape(group.facts["tasks"])}</h2><dl class="facts">{"".join(entries)}</dl>'
        f"{scores}{''.join(costs)}{_list(notes(group))}{_published(group)}{more}</section>\n"
    )


def _published(group: Group) -> str:
    found = "".join(
        f'<div class="published"><h3>Published: <a href="{escape(table.link)}">{escape(table.source)}</a></h3>'
        f'<p class="soft">{escape(table.setting)}. {escape(PUBLISHED)}</p>{_table(published_table(table))}</div>'
        for table in papers(group)
    )
    return f'<div class="papers">{found}</div>' if found else ""


def _comparison(comparison: Comparison) -> str:
    parts = [f"<h2>Comparison {escape(str(comparison.folder))}</h2>"]
    if comparison.trouble:
        parts.append(_list([comparison.trouble]))
    else:
        parts.append(f'<p class="soft">Stream: {escape(comparison.stream)}</p>')
        if comparison.searched:
            parts.append(f'<h3>Learning rates tried</h3><p class="soft">Chosen: {escape(comparison.rule)}.</p>')
            parts.append(_table(trials(comparison)))
        if comparison.deviations:
            parts.append(f"<h3>Where a row was not given what the others were</h3>{_list(comparison.deviations)}")
        if comparison.failed:
            parts.append(f"<h3>Failed runs</h3>{_table(failures(comparison))}")
    return f"<section>{''.join(parts)}</section>\n"


def _unread(report: Report) -> str:
    if not report.unread:
        return ""
    return f"<section><h2>Not read</h2>{_list(f'{run.folder}: {run.trouble}' for run in report.unread)}</section>\n"


def _meanings(report: Report) -> str:
    heads = {name for group in report.groups for table in results(group) for name in table.head}
    entries = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in MEANINGS.items() if name in heads
    )
    return f'<section><h2>What the columns say</h2><dl class="words">{entries}</dl></section>\n' if entries else ""


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col"{_meaning(name)}>{escape(name)}</th>' for name in table.head)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in table.rows)
    kind = ' class="words"' if table.words else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _meaning(name: str) -> str:
    return f' title="{escape(MEANINGS[name])}"' if name in MEANINGS else ""


def _cells(row: Sequence[str]) -> str:
    first, *others = row
    return f'<th scope="row">{_settings(escape(first))}</th>' + "".join(
        f"<td>{_deviation(escape(cell))}</td>" for cell in others
    )


def _settings(label: str) -> str:
    """What tells a row from others of its name, below the name."""
    name, sign, told = label.partition(" (")
    return f"{name} <small>{told.removesuffix(')')}</small>" if sign else name


def _deviation(cell: str) -> str:
    """Smaller than the mean that it is of."""
    mean, sign, deviation = cell.partition(" ± ")
    return f"{mean} <small>± {deviation}</small>" if sign else cell


def _list(lines: Iterable[str]) -> str:
    entries = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{entries}</ul>' if entries else ""
