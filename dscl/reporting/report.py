"""`dscl report`: what runs have come to, as one HTML file that needs nothing else, and the same tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dscl.reporting.comparison import read_comparison
from dscl.reporting.groups import grouped
from dscl.reporting.markdown import markdown
from dscl.reporting.page import page
from dscl.reporting.runs import find, read_run
from dscl.reporting.tables import Report
from dscl.utils.errors import Failure, UserError

__all__ = ["write"]


def write(runs: Sequence[Path], out: Path) -> list[Path]:
    """Write `report.html` and `report.md` of these runs into the folder `out`; a folder of runs stands for all."""
    report = read(runs)
    texts = {"report.html": page(report), "report.md": markdown(report)}
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: given {out}, which is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / name).write_text(text, "utf-8", errors="replace")
    except OSError as error:
        raise Failure(
            f"{out}: the report cannot be written ({error.strerror}); make room or name another --out"
        ) from None
    return [out / name for name in texts]


def read(given: Sequence[Path]) -> Report:
    """Everything that the report shows."""
    folders, documents = find(given)
    comparisons = [read_comparison(path) for path in documents]
    runs = [
        read_run(folder, next((name for name in (of.row(folder) for of in comparisons) if name), ""))
        for folder in folders
    ]
    order = [row for comparison in comparisons for row in comparison.trials or {}]
    runs.sort(key=lambda run: order.index(run.row) if run.row in order else len(order))
    return Report(
        groups=grouped([run for run in runs if run.recipe]),
        comparisons=comparisons,
        unread=[run for run in runs if not run.recipe],
        runs=len(runs),
    )
