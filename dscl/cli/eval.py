"""`dscl eval`: its arguments, and the call of `dscl.training.run`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dscl.cli.lazy_imports import import_training_runs
from dscl.cli.verb import ArgumentParser, DistributedVerb, add_checkpoint_argument, add_overrides, split_names
from dscl.utils.errors import UserError

if TYPE_CHECKING:
    from dscl.recipe.recipe import Recipe

EXAMPLE = """example:
  dscl eval out/a --nproc 2 evaluate.mode=generate

Evaluates the newest checkpoint of a run (or --checkpoint) on all its tasks and prints one JSON line; the run itself is
not changed."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR")
    add_overrides(parser, "evaluate.key=value", "overrides of evaluate.*")
    parser.add_argument("--lm-eval", metavar="A,B", help="also evaluate these tasks of lm-eval, if it is installed")
    parser.add_argument("--limit", type=int, metavar="N", help="with --lm-eval: how many samples of each of its tasks")
    add_checkpoint_argument(parser)


def read_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of the run, with the overrides of its section `evaluate`."""
    from dscl.recipe.recipe import read_run_recipe

    return read_run_recipe(options.run, options.assignments)


def run(options: argparse.Namespace, recipe: Recipe) -> None:
    runs = import_training_runs()
    lm_eval_tasks = split_names(options.lm_eval)
    if options.limit is not None and (not lm_eval_tasks or options.limit < 1):
        raise UserError(f"--limit: given {options.limit}; it needs --lm-eval, and a number of at least 1")
    runs.evaluate_run(options.run, options.assignments, lm_eval_tasks, options.limit, options.checkpoint)


EVAL = DistributedVerb("evaluate a checkpoint of a run", EXAMPLE, add_arguments, read_recipe, run)
