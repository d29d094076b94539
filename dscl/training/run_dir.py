"""The run directory: created, locked by one process group at a time, and never shared by runs of different recipes."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

import yaml

from dscl.distributed import comm
from dscl.recipe.recipe import Recipe, find_difference, resolve_recipe
from dscl.training.checkpoint import SAVED_FILE
from dscl.utils.atomic_io import write_text_atomically
from dscl.utils.errors import UserError

log = logging.getLogger("dscl")
LOCK_FILE = ".lock"


def has_saved_checkpoint(recipe: Recipe) -> bool:
    """Whether this run ever saved a checkpoint, even if it has been removed since."""
    return (recipe.run_folder / SAVED_FILE).exists() or any(recipe.run_folder.glob("checkpoints/step-*"))


def reject_other_recipe(recipe: Recipe) -> None:
    """Raise a `UserError` if the run directory holds results of a recipe with other settings."""
    stored = recipe.run_folder / "recipe.yaml"
    if not (has_saved_checkpoint(recipe) or (recipe.run_folder / "scores.json").exists()) or not stored.is_file():
        return
    try:
        stored_recipe = yaml.safe_load(stored.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{stored}: cannot be read ({' '.join(str(error).split())}); choose another run_dir") from None
    with suppress(UserError):  # a recipe of another version with unknown keys is compared as it stands
        stored_recipe = resolve_recipe(stored_recipe).to_dict()
    if changed := find_difference(stored_recipe, recipe.to_dict()):
        raise UserError(
            f"run_dir: {recipe.run_dir} holds a run with another {changed}; "
            "choose another run_dir, remove that folder, or give the settings it was started with"
        )


@contextmanager
def lock_run_dir(recipe: Recipe) -> Iterator[None]:
    """Create the run directory, write the resolved recipe into it, and keep other runs out while this one lives.

    The main rank holds a lock of the operating system, which ends with its process however that dies.
    """
    comm.barrier()  # all ranks have read the directory's previous content
    problem, lock = "", None
    if comm.is_main():
        try:
            recipe.run_folder.mkdir(parents=True, exist_ok=True)
            lock = _acquire_lock(recipe)
            (recipe.run_folder / "checkpoints").mkdir(exist_ok=True)
            write_text_atomically(recipe.run_folder / "recipe.yaml", recipe.to_yaml())
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"run_dir: {recipe.run_dir} cannot be written ({error.strerror}); choose another"
    try:
        if problem := comm.broadcast_from_main(problem):
            raise UserError(problem)
        yield
    finally:
        if lock is not None:
            lock.close()


def _acquire_lock(recipe: Recipe) -> IO[str] | None:
    """The locked file, to be kept open; None on a file system without locks. A `UserError` if another run holds it."""
    file = open(recipe.run_folder / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - stays open as long as the run
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
        log.warning("%s: no locks there (%s), so a second job would not be noticed", recipe.run_folder, error.strerror)
        return None
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
    file.flush()
    return file
