"""The command line: verbs, exit statuses, and one clear line where something is wrong.

Exit status 0: done; 1: an internal failure; 2: the input is wrong. Heavy imports happen inside the verbs, so that help
and wrong words answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import NoReturn

from dscl.errors import Failure, UserError
from dscl.observe.quiet import quiet
from dscl.spawn import die_with_parent, how_many, spawn

TRAIN_EXAMPLE = """example:
  dscl train recipe.yaml --nproc 2 run_dir=out/a train.lr=1e-4

Run it again with the same run_dir and it resumes; with --dry-run it checks everything up to the first step and stops.
Under torchrun, deepspeed or srun leave --nproc out: the ranks they started are joined."""

EVAL_EXAMPLE = """example:
  dscl eval out/a --nproc 2 evaluate.mode=generate

Evaluates the newest checkpoint of a run on all its tasks and prints one JSON line; the run itself is not changed."""


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong word is told in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(given)
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # every rank finds the same mistake; one a machine tells it
            print(f"dscl: {error}", file=sys.stderr)
        return 2
    except Failure as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"dscl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dscl: interrupted; run the same command again to resume", file=sys.stderr)
        return 1


def _run(given: list[str]) -> int:
    options, rest = _parser().parse_known_args(given)
    for word in rest:  # argparse loses positional words that follow an option
        if word.startswith("-") or "=" not in word:
            raise UserError(f"{word}: not understood; see dscl {options.verb} --help")
        options.assignments.append(word)
    if options.nproc is not None:
        if "RANK" in os.environ:
            raise UserError("--nproc: a launcher has already started the ranks (RANK is set); leave --nproc out")
        count = how_many(options.nproc)
        if count > 1:
            return spawn(count, _without_nproc(given))
    die_with_parent()
    quiet()
    _log()
    from dscl import dist, train  # after the switches of quiet(); and they take seconds
    from dscl.recipe import read_recipe

    with dist.session():
        if options.verb == "train":
            recipe = read_recipe(options.recipe, options.assignments)
            (train.rehearse if options.dry_run else train.train)(recipe)
        elif options.verb == "eval":
            train.evaluate(options.run, options.assignments)
    return 0


def _parser() -> Parser:
    from dscl import __version__

    parser = Parser(prog="dscl", description="Fine-tune LLaMA-class language models on one task after another.")
    parser.add_argument("--version", action="version", version=f"dscl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)

    def verb(name: str, what: str, example: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name, help=what, description=what, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.add_argument("--nproc", metavar="N|auto", help="start N ranks on this machine (auto: one for each GPU)")
        return made

    train = verb("train", "train a recipe's stream of tasks", TRAIN_EXAMPLE)
    train.add_argument("recipe", metavar="RECIPE.yaml")
    train.add_argument("assignments", nargs="*", metavar="key=value", help="dotted overrides of the recipe's keys")
    train.add_argument("--dry-run", action="store_true", help="build and check everything, show the plan, stop")
    evaluate = verb("eval", "evaluate a run's newest checkpoint", EVAL_EXAMPLE)
    evaluate.add_argument("run", metavar="RUN_DIR")
    evaluate.add_argument("assignments", nargs="*", metavar="evaluate.key=value", help="overrides of evaluate.*")
    return parser


def _without_nproc(given: list[str]) -> list[str]:
    kept, skip = [], False
    for word in given:
        if skip:
            skip = False
        elif word == "--nproc":
            skip = True
        elif not word.startswith("--nproc="):
            kept.append(word)
    return kept


def _log() -> None:
    """dscl's own warnings, one line each, from one rank a machine."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("dscl: %(message)s"))
    logger = logging.getLogger("dscl")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if int(os.environ.get("LOCAL_RANK", "0")) == 0 else logging.CRITICAL)
