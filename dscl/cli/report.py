"""`dscl report`: its arguments, and the call of `dscl.reporting.report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dscl.cli.verb import ArgumentParser, Verb

EXAMPLE = """example:
  dscl report out/a out/b --out out/report

Writes report.html (one file that needs no network) and report.md: scores, score matrices, forgetting over time,
routing, bytes, time and memory. Runs that differ only in their seed are averaged. Runs of another stream or budget are
listed separately. A folder that contains runs stands for all of them."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders that hold some")
    parser.add_argument("--out", required=True, metavar="DIR", help="where report.html and report.md go")


def run(options: argparse.Namespace) -> None:
    from dscl.reporting import report

    folders = [Path(folder).expanduser() for folder in options.runs]
    for path in report.write_report(folders, Path(options.out).expanduser()):
        print(path)


REPORT = Verb("write a page with the results of runs", EXAMPLE, add_arguments, run)
