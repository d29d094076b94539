"""The run directory: made, held by one job at a time, and never given to another recipe's run."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import yaml

from dscl.distributed import comm
from dscl.methods.base import Facts
from dscl.recipe.recipe import Recipe, difference, resolve
from dscl.training.checkpoint import SAVED
from dscl.utils.errors import UserError

log = logging.getLogger("dscl")
LOCK = ".lock"
BASE = "base.json"  # fingerprints


def saved(recipe: Recipe) -> bool:
    """Whether the run has saved a checkpoint, be it there still or not."""
    return (recipe.folder / SAVED).exists() or any(recipe.folder.glob("checkpoints/step-*"))


def refuse_another_run(recipe: Recipe) -> None:
    """A run directory that has results of other settings is not touched."""
    stored = recipe.folder / "recipe.yaml"
    if not (saved(recipe) or (recipe.folder / "scores.json").exists()) or not stored.is_file():
        return
    try:
        there = yaml.safe_load(stored.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{stored}: cannot be read ({' '.join(str(error).split())}); choose another run_dir") from None
    with suppress(UserError):  # of a version with other keys: what it leaves out is as it is by default
        there = resolve(there).document()
    if changed := difference(there, recipe.document()):
        raise UserError(
            f"run_dir: {recipe.run_dir} holds a run with another {changed}; "
            "choose another run_dir, remove that folder, or give the settings it was started with"
        )


def refuse_another_base(recipe: Recipe, facts: Facts) -> None:
    """What has been learnt so far is of one model and one tokenizer, which may be changed in place between two starts.

    The run directory is held.
    """
    path = recipe.folder / BASE
    here = {"model": facts.model, "tokenizer": facts.tokenizer}
    problem = ""
    if comm.is_main():
        try:
            there = json.loads(path.read_text("utf-8")) if saved(recipe) else here
        except (OSError, ValueError):  # of a version that did not write it
            there = here
        if changed := [what for what, mark in here.items() if there.get(what) != mark]:
            problem = (
                f"run_dir: {recipe.run_dir} was started with another {' and '.join(changed)} than {facts.base} holds "
                "now; put back what was there, or choose another run_dir"
            )
        else:
            try:
                write_whole(path, json.dumps(here))
            except OSError as error:
                problem = f"run_dir: {recipe.run_dir} cannot be written ({error.strerror}); choose another"
    if problem := comm.from_main(problem):
        raise UserError(problem)


@contextmanager
def held(recipe: Recipe) -> Iterator[None]:
    """Make the run directory, write the resolved recipe into it, and keep other jobs out as long as this one lives.

    The lock is the main rank's and the system's own, so that it ends with the process, however that dies.
    """
    comm.barrier()  # all have read what was there
    problem, lock = "", None
    if comm.is_main():
        try:
            recipe.folder.mkdir(parents=True, exist_ok=True)
            lock = _locked(recipe)
            (recipe.folder / "checkpoints").mkdir(exist_ok=True)
            write_whole(recipe.folder / "recipe.yaml", recipe.text())
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"run_dir: {recipe.run_dir} cannot be written ({error.strerror}); choose another"
    try:
        if problem := comm.from_main(problem):
            raise UserError(problem)
        yield
    finally:
        if lock is not None:
            lock.close()


def _locked(recipe: Recipe) -> IO[str] | None:
    file = open(recipe.folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another job"
        file.close()
        raise UserError(
            f"run_dir: {recipe.run_dir} is in use by {holder}; wait until that has ended, stop it, or choose another"
        ) from None
    except OSError as error:
        file.close()
        log.warning("%s: no locks there (%s), so a second job would not be noticed", recipe.folder, error.strerror)
        return None
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
    file.flush()
    return file


def write_whole(path: Path, text: str) -> None:
    """A reader finds either the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
