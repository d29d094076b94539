"""The command line: verbs, exit statuses, and one clear line where something is wrong.

Exit status 0: done; 1: an internal failure; 2: the input is wrong. Heavy imports happen inside the verbs, so that help
and wrong words answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from dscl import __version__
from dscl.config import nearest
from dscl.errors import Failure, UserError
from dscl.observe.quiet import quiet
from dscl.spawn import die_with_parent, how_many, spawn, spawned, tell

ABOUT = """Fine-tune LLaMA-class language models on one task after another.

example:
  dscl train recipe.yaml --nproc 2

dscl VERB --help explains a verb."""

TRAIN_EXAMPLE = """example:
  dscl train recipe.yaml --nproc 2 run_dir=out/a train.lr=1e-4

Run it again with the same run_dir and it resumes; with --dry-run it checks everything up to the first step and stops.
Under torchrun, deepspeed or srun leave --nproc out: the ranks they started are joined."""

EVAL_EXAMPLE = """example:
  dscl eval out/a --nproc 2 evaluate.mode=generate

Evaluates the newest checkpoint of a run on all its tasks and prints one JSON line; the run itself is not changed."""

VERBS = {
    "train": ("train a recipe's stream of tasks", TRAIN_EXAMPLE),
    "eval": ("evaluate a run's newest checkpoint", EVAL_EXAMPLE),
}


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong word is told in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    given = [word for word in given if not word.startswith("--local_rank=")]  # DeepSpeed's launcher adds it
    return guarded(lambda: _start(given))


def guarded(work: Callable[[], int]) -> int:
    """The exit status of `work`; what goes wrong in it is told."""
    try:
        return work()
    except UserError as error:
        return _told(2, error)
    except Failure as error:
        return _told(1, error)
    except KeyboardInterrupt:
        tell(1, "dscl: interrupted; run the same command again to resume", patience=0.0)
    except Exception:
        tell(1, traceback.format_exc())
    return 1


def _told(status: int, error: Exception) -> int:
    tell(status, "dscl: " + " ".join(str(error).splitlines()))  # one line, whatever the names in it hold
    return status


def _start(given: list[str]) -> int:
    """Read the words; then be the spawner, or a rank."""
    die_with_parent()
    options = _read(given)
    if options.nproc is not None and not spawned():
        if "RANK" in os.environ:
            raise UserError("--nproc: a launcher has already started the ranks (RANK is set); leave --nproc out")
        count = how_many(options.nproc)
        if count > 1:
            return spawn(count, given)
    quiet()
    _log()
    from dscl import dist  # after the switches of quiet(); and it takes seconds

    with dist.session():  # a rank tells its mistake before it leaves, which fails the others
        return guarded(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from dscl import train
    from dscl.recipe import read_recipe

    if options.verb == "train":
        recipe = read_recipe(options.recipe, options.assignments)
        (train.rehearse if options.dry_run else train.train)(recipe)
    else:
        train.evaluate(options.run, options.assignments)
    return 0


def _read(given: list[str]) -> argparse.Namespace:
    allowed = f"allowed: {', '.join(VERBS)}; see dscl --help"
    if not given:
        raise UserError(f"no verb given; {allowed}")
    if given[0] not in VERBS and not given[0].startswith("-"):
        raise UserError(f"{given[0]}: no such verb{nearest(given[0], VERBS)}; {allowed}")
    options, rest = _parser().parse_known_args(given)
    for word in rest:  # argparse loses positional words that follow an option
        if word.startswith("-") or "=" not in word:
            raise UserError(f"{word}: not understood; allowed: key=value and options, see dscl {options.verb} --help")
        options.assignments.append(word)
    return options


def _parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="dscl", description=ABOUT, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dscl {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    made = {}
    for verb, (what, example) in VERBS.items():
        made[verb] = subparsers.add_parser(
            verb, help=what, description=what, epilog=example, formatter_class=raw, allow_abbrev=False
        )
        made[verb].add_argument("--nproc", metavar="N|auto", help="start N ranks here (auto: one for each GPU)")
    train, evaluate = made["train"], made["eval"]
    words: dict[str, Any] = {"nargs": "*", "default": []}
    train.add_argument("recipe", metavar="RECIPE.yaml")
    train.add_argument("assignments", **words, metavar="key=value", help="dotted overrides of the recipe's keys")
    train.add_argument("--dry-run", action="store_true", help="build and check everything, show the plan, stop")
    evaluate.add_argument("run", metavar="RUN_DIR")
    evaluate.add_argument("assignments", **words, metavar="evaluate.key=value", help="overrides of evaluate.*")
    return parser


def _log() -> None:
    """dscl's own warnings, one line each, from one rank a machine."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("dscl: %(message)s"))
    logger = logging.getLogger("dscl")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if int(os.environ.get("LOCAL_RANK", "0")) == 0 else logging.CRITICAL)
