"""The command line: how its words become a call of one verb, exit statuses, and error messages of one line.

A verb's file says which arguments it takes and what it does. Exit status 0: done; 1: a failure; 2: wrong input; 75:
stopped on purpose, to be run again. Heavy imports happen inside the functions of the verbs, so that `--help` and errors
in the arguments appear at once.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from dscl import __version__
from dscl.cli.compare import COMPARE
from dscl.cli.doctor import DOCTOR
from dscl.cli.eval import EVAL
from dscl.cli.export import EXPORT
from dscl.cli.generate import GENERATE
from dscl.cli.import_adapters import IMPORT_ADAPTERS
from dscl.cli.lazy_imports import disable_gc_for_imports
from dscl.cli.plan import PLAN
from dscl.cli.report import REPORT
from dscl.cli.train import TRAIN
from dscl.cli.verb import ArgumentParser, DistributedVerb, Verb
from dscl.config.parsing import did_you_mean
from dscl.distributed.launcher import (
    die_with_parent,
    is_spawned_rank,
    launcher_local_rank,
    parse_nproc,
    prepare_rank_process,
    report_exit,
    resolve_exit_status,
    spawn_ranks,
)
from dscl.utils.errors import ExternalFailure, RunStopped, UserError
from dscl.utils.quiet import silence_libraries

VERBS: dict[str, Verb | DistributedVerb] = {
    "train": TRAIN,
    "plan": PLAN,
    "doctor": DOCTOR,
    "eval": EVAL,
    "generate": GENERATE,
    "export": EXPORT,
    "compare": COMPARE,
    "report": REPORT,
    "import-adapters": IMPORT_ADAPTERS,
}
ABOUT = """Fine-tune LLaMA-class language models on one task after another.

example:
  dscl train recipe.yaml --nproc 2

dscl VERB --help explains a verb."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (default: sys.argv) and return the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    words = [word for word in words if not word.startswith("--local_rank=")]  # DeepSpeed's launcher adds it
    return resolve_exit_status(run_with_error_report(lambda: _dispatch(words)))


def _dispatch(words: list[str]) -> int:
    """Parse the command line, then run its verb here, or spawn ranks that do."""
    die_with_parent()
    prepare_rank_process()
    options = _parse_arguments(words)
    verb = VERBS[options.verb]
    if isinstance(verb, DistributedVerb):
        return _run_distributed(verb, options, words)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{options.verb}: runs in one process; start it without a launcher (WORLD_SIZE is set)")
    silence_libraries()
    _configure_logging()
    verb.run(options)
    return 0


def _run_distributed(verb: DistributedVerb, options: argparse.Namespace, words: list[str]) -> int:
    """Spawn the ranks of --nproc, or run the verb as one of the ranks."""
    if options.nproc is not None and "RANK" in os.environ and not is_spawned_rank():
        raise UserError("--nproc: a launcher has already started the ranks (RANK is set); leave --nproc out")
    # Under a launcher the recipe is read after all ranks have connected. If a rank failed before that, the others would
    # wait for it.
    recipe = None if _has_launcher_environment() else verb.read_recipe(options)
    if options.nproc is not None and not is_spawned_rank():
        count = parse_nproc(options.nproc)
        if count > 1:
            return spawn_ranks(count, words)
    silence_libraries()
    _configure_logging()
    with disable_gc_for_imports():  # after silence_libraries(), which has to come before these imports
        from dscl.distributed import comm
        from dscl.distributed.liveness import Liveness

    def run_verb() -> int:
        verb.run(options, recipe or verb.read_recipe(options))
        return 0

    # A rank reports its error before it leaves the process group, because that makes the other ranks fail.
    with comm.process_group(), Liveness() as liveness:
        return liveness.set_exit_status(run_with_error_report(lambda: liveness.run_watched(run_verb)))


def _has_launcher_environment() -> bool:
    """Whether this process is one of the ranks that `--nproc`, torchrun, deepspeed or srun has started."""
    return bool({"RANK", "SLURM_PROCID"} & set(os.environ))


def _parse_arguments(words: list[str]) -> argparse.Namespace:
    allowed = f"allowed: {', '.join(VERBS)}; see dscl --help"
    if not words:
        raise UserError(f"no verb given; {allowed}")
    if words[0] not in VERBS and not words[0].startswith("-"):
        raise UserError(f"{words[0]}: no such verb{did_you_mean(words[0], VERBS)}; {allowed}")
    options, unknown_words = _build_parser().parse_known_args(words)
    for word in unknown_words:  # argparse does not collect positional arguments that follow an option
        accepts_overrides = VERBS[options.verb].accepts_overrides
        allowed = "key=value and options" if accepts_overrides else "options"
        if word.startswith("-") or "=" not in word or not accepts_overrides:
            raise UserError(f"{word}: not understood; allowed: {allowed}, see dscl {options.verb} --help")
        options.assignments.append(word)
    return options


def _build_parser() -> ArgumentParser:
    raw_text = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(prog="dscl", description=ABOUT, formatter_class=raw_text, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dscl {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=ArgumentParser)
    for name, verb in VERBS.items():
        verb_parser = subparsers.add_parser(
            name,
            help=verb.summary,
            description=verb.summary,
            epilog=verb.example,
            formatter_class=raw_text,
            allow_abbrev=False,
        )
        if isinstance(verb, DistributedVerb):
            verb_parser.add_argument("--nproc", metavar="N|auto", help="start N ranks here (auto: one for each GPU)")
        verb.add_arguments(verb_parser)
    return parser


def _configure_logging() -> None:
    """Print dscl's log messages on stderr, one line each, from one rank of each machine."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("dscl: %(message)s"))
    logger = logging.getLogger("dscl")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if launcher_local_rank() == 0 else logging.CRITICAL)


def run_and_exit() -> NoReturn:
    """Run `main`, call the functions registered with atexit, and end the process without shutting Python down.

    Threads that libraries left running can abort the shutdown of the interpreter after everything is done and saved.
    """
    status = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def run_with_error_report(work: Callable[[], int]) -> int:
    """Run `work` and return its exit status; an exception is reported on stderr and becomes an exit status."""
    try:
        return work()
    except UserError as error:
        return _report_error(2, error)
    except ExternalFailure as error:
        return _report_error(1, error)
    except RunStopped as error:
        return _report_error(75, error)
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        report_exit(1, "dscl: interrupted; run the same command again to resume", delay=0.0)
    except Exception:
        report_exit(1, traceback.format_exc())
    return 1


def _report_error(status: int, error: Exception) -> int:
    report_exit(status, "dscl: " + " ".join(str(error).splitlines()))  # one line, even if a file name has line breaks
    return status
