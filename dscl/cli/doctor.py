"""`dscl doctor`: its arguments, and the call of `dscl.training.run`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dscl.cli.lazy_imports import import_training_runs
from dscl.cli.verb import DistributedVerb, add_recipe_arguments, read_recipe_argument

if TYPE_CHECKING:
    from dscl.recipe.recipe import Recipe

EXAMPLE = """example:
  dscl doctor recipe.yaml --nproc 2
  torchrun ... -m dscl doctor recipe.yaml

All ranks compare their program versions, recipe, data, model and clocks, and check that they share run_dir. They
measure free memory, network bandwidth and compute speed. Every problem is printed with its host, and the exit status
is then 2. Nothing is trained. dscl train --doctor runs the same checks and then trains, as the launch scripts do."""


def run(options: argparse.Namespace, recipe: Recipe) -> None:
    import_training_runs().diagnose_cluster(recipe)


DOCTOR = DistributedVerb(
    "check whether machines can run a recipe", EXAMPLE, add_recipe_arguments, read_recipe_argument, run
)
