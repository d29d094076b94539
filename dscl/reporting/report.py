"""`dscl report`: the results of runs as one self-contained HTML file, and the same tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dscl.reporting.comparison import read_comparison_result
from dscl.reporting.groups import group_runs
from dscl.reporting.markdown import render_markdown
from dscl.reporting.page import render_html
from dscl.reporting.runs import find_runs, read_run
from dscl.reporting.tables import Report
from dscl.utils.atomic_io import write_text_atomically
from dscl.utils.errors import ExternalFailure, UserError

__all__ = ["write_report"]


def write_report(runs: Sequence[Path], out: Path) -> list[Path]:
    """Write `report.html` and `report.md` into the folder `out`. `runs`: run directories, or folders that hold some."""
    report = collect_report(runs)
    texts = {"report.html": render_html(report), "report.md": render_markdown(report)}
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: given {out}, which is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text_atomically(out / name, text, errors="replace")
    except OSError as error:
        raise ExternalFailure(
            f"{out}: the report cannot be written ({error.strerror}); make room or name another --out"
        ) from None
    return [out / name for name in texts]


def collect_report(paths: Sequence[Path]) -> Report:
    """Read the runs and comparisons in these folders and group the runs into tables."""
    run_folders, comparison_files = find_runs(paths)
    comparisons = [read_comparison_result(path) for path in comparison_files]

    def find_row(folder: Path) -> str:
        return next((row for row in (comparison.find_row(folder) for comparison in comparisons) if row), "")

    runs = [read_run(folder, find_row(folder)) for folder in run_folders]
    row_order = [row for comparison in comparisons for row in comparison.trials or {}]
    runs.sort(key=lambda run: row_order.index(run.row) if run.row in row_order else len(row_order))
    return Report(
        groups=group_runs([run for run in runs if run.recipe]),
        comparisons=comparisons,
        unread=[run for run in runs if not run.recipe],
        num_runs=len(runs),
    )
