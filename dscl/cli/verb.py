"""What a verb of the command line consists of, and the parser that all verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from dscl.utils.errors import UserError

if TYPE_CHECKING:
    from dscl.recipe.recipe import Recipe


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, except that a wrong argument is a UserError, which prints one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class Verb:
    """A verb that runs in one process."""

    summary: str
    example: str  # the last part of its help
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    accepts_overrides: bool = False  # whether it takes key=value


@dataclass(frozen=True)
class DistributedVerb:
    """A verb that may run on several ranks: those that --nproc spawns, or those that a launcher has started."""

    summary: str
    example: str  # the last part of its help
    add_arguments: Callable[[ArgumentParser], None]
    read_recipe: Callable[[argparse.Namespace], Recipe]  # imports no heavy package
    run: Callable[[argparse.Namespace, Recipe], None]  # called on every rank
    accepts_overrides: bool = True


def add_recipe_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    add_overrides(parser, "key=value", "dotted overrides of the recipe's keys")


def add_overrides(parser: ArgumentParser, metavar: str, help_text: str) -> None:
    parser.add_argument("assignments", nargs="*", default=[], metavar=metavar, help=help_text)


def add_checkpoint_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="NAME|best", help="which checkpoint of the run (default: the newest)")


def read_recipe_argument(options: argparse.Namespace) -> Recipe:
    """Read and check the recipe that the command line names, with its overrides."""
    from dscl.recipe.recipe import read_recipe

    return read_recipe(options.recipe, options.assignments)


def split_names(text: str | None) -> list[str]:
    """The names in a list with commas; none without the option."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
