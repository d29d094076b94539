"""`dscl train`: its arguments, and the call of `dscl.training.run`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dscl.cli.lazy_imports import disable_gc_for_imports
from dscl.cli.verb import ArgumentParser, DistributedVerb, add_recipe_arguments, read_recipe_argument

if TYPE_CHECKING:
    from dscl.recipe.recipe import Recipe

EXAMPLE = """example:
  dscl train recipe.yaml --nproc 2 run_dir=out/a train.lr=1e-4

Run it again with the same run_dir and it resumes; with --dry-run it checks everything up to the first step and stops.
Under torchrun, deepspeed or srun leave --nproc out: the ranks they started are joined."""


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--doctor", action="store_true", help="first check whether the machines can run the recipe")
    parser.add_argument("--dry-run", action="store_true", help="build and check everything, show the plan, stop")


def run(options: argparse.Namespace, recipe: Recipe) -> None:
    with disable_gc_for_imports():
        from dscl.distributed.preemption import StopHandler
        from dscl.training.dry_run import dry_run
        from dscl.training.run import train

    with StopHandler().handle_signals() as stop:
        if options.dry_run:
            dry_run(recipe)
        else:
            train(recipe, stop, options.doctor)


TRAIN = DistributedVerb("train a recipe's stream of tasks", EXAMPLE, add_arguments, read_recipe_argument, run)
