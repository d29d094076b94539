"""`dscl compare`: its arguments, and the call of `dscl.reporting.compare`."""

from __future__ import annotations

import argparse

from dscl.cli.lazy_imports import choose_accelerator
from dscl.cli.verb import ArgumentParser, Verb, add_overrides, split_names
from dscl.distributed.launcher import parse_nproc
from dscl.utils.errors import UserError

EXAMPLE = """example:
  dscl compare launch/comparisons/methods.yaml folder=data --methods sequential,asr,osft --seeds 3

The file is a recipe without method and train.lr, but with a section compare: the learning rates that every method tries
on the dev split (equally many each), and rows, which are methods with settings. --methods selects rows, or methods with
their defaults. All runs have the same samples, order, epochs, batches and evaluation. They run in parallel as far as
the machine allows. The same command resumes a comparison and does not repeat complete runs. At the end it writes a
report into run_dir."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="STREAM.yaml")
    add_overrides(parser, "key=value", "dotted overrides of the file's keys")
    parser.add_argument("--methods", metavar="A,B,C", help="rows of the file, or methods (default: all rows)")
    parser.add_argument("--seeds", metavar="N", help="how many, or seeds like 3,4,5 (default: the file's, or 3)")
    parser.add_argument(
        "--max-parallel", type=int, metavar="N", help="runs side by side (default: as GPUs or cores allow)"
    )
    parser.add_argument("--nproc", metavar="N", help="ranks of each run (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, name the runs, stop")


def run(options: argparse.Namespace) -> None:
    """Run a comparison, or with --dry-run print its runs. Every run is a process of its own."""
    if options.max_parallel is not None and options.max_parallel < 1:
        raise UserError(f"--max-parallel: given {options.max_parallel}; at least 1 is needed")
    from dscl.reporting import compare

    methods, seeds = split_names(options.methods), _parse_seeds(options.seeds)
    comparison = compare.read_comparison_plan(options.recipe, options.assignments, methods, seeds)
    if options.dry_run:
        for planned_run in comparison.all_runs():
            print(planned_run.name)
        return
    choose_accelerator()
    for path in compare.run_comparison(comparison, options.max_parallel, parse_nproc(options.nproc or "1")):
        print(path)
    print((comparison.folder / "report.md").read_text("utf-8"))


def _parse_seeds(text: str | None) -> list[int]:
    """The seeds of `--seeds`: `3` means 0, 1 and 2; `3,4` means 3 and 4; none without the option."""
    if text is None:
        return []
    if not all(word.isdecimal() for word in text.split(",")) or text == "0":
        raise UserError(f"--seeds: given {text!r}; allowed: how many, or seeds like 3,4,5")
    numbers = [int(word) for word in text.split(",")]
    return numbers if "," in text else list(range(numbers[0]))


COMPARE = Verb(
    "train several methods on one stream, with equal budgets", EXAMPLE, add_arguments, run, accepts_overrides=True
)
