"""Storage errors in real runs: each is reported in one line, and the run resumes from earlier checkpoints."""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from dscl.monitoring import metrics_file
from dscl.training import checkpoint
from dscl.training.checkpoint import MARKER_FILE
from tests.support import programs
from tests.support.pool import fork_context
from tests.support.runs import (
    copy_run,
    recipe_of,
    reference_recipe,
    run,
    run_error,
    run_listening,
    run_outcome,
    run_until_killed,
    write_tasks,
)

FULL = "No space left on device"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def killed(ranks: Any, tasks: Path) -> Path:
    """A run that was killed in its seventh step, to be copied."""
    document = recipe_of(tasks, "killed")
    ranks(1)(run_until_killed, document, 7)
    return Path(document["run_dir"])


@contextmanager
def replaced_open(module: Any, instead: Any) -> Iterator[None]:
    """Replace `open` in a module."""
    module.open = instead
    try:
        yield
    finally:
        del module.open


def run_on_a_full_disk(document: dict[str, Any], name: str) -> tuple[str, str]:
    """Run; writing to files of this name fails with a full disk."""

    def open_or_full(path: Path, mode: str = "r", **more: Any) -> Any:
        full = Path(path).name == name and mode in ("wb", "ab")
        return open("/dev/full" if full else path, mode, **more)

    with replaced_open(checkpoint, open_or_full), replaced_open(metrics_file, open_or_full):
        return run_error(document)


@pytest.mark.parametrize("name", ["state.json", MARKER_FILE, "metrics.jsonl", "scores.json"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here, which stands for a full disk")
def test_a_full_disk_is_told_whichever_file_it_hits(
    ranks: Any, undisturbed_run: Any, killed: Path, tasks: Path, name: str
) -> None:
    document = recipe_of(tasks, f"full {name}")
    folder = copy_run(killed, f"full {name}")
    names_before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names_before == ["step-00000003", "step-00000006"]
    partial = folder / "scores.json.partial"
    if name == "scores.json":
        partial.symlink_to("/dev/full")
    ((kind, message),) = ranks(1)(run_on_a_full_disk, document, name)
    assert kind == "ExternalFailure"
    assert FULL in message
    assert len(message.splitlines()) == 1
    assert str(folder) in message
    names_after = sorted(path.name for path in (folder / "checkpoints").iterdir())
    if name in ("state.json", MARKER_FILE):
        assert "step-00000006 is intact" in message
        assert names_after == names_before
    partial.unlink(missing_ok=True)
    (line,) = [line for line in ranks(1)(run_listening, document)[0] if "resumed" in line]
    assert f"resumed from {names_after[-1]}" in line
    assert run_outcome(folder) == run_outcome(undisturbed_run(*reference_recipe(tasks, world=1)))


def run_on_a_failing_disk(document: dict[str, Any], name: str) -> list[str]:
    """Run; a checkpoint's file of this name cannot be read. The messages of the run."""

    def open_or_fail(path: Path, mode: str = "r", **more: Any) -> Any:
        if Path(path).name == name and Path(path).parent.name == "step-00000006" and mode == "rb":
            raise OSError(5, os.strerror(5), str(path))
        return open(path, mode, **more)

    with replaced_open(checkpoint, open_or_fail):
        return run_listening(document)


@pytest.mark.parametrize("name", ["state.json", "rank-00000.safetensors"])
def test_a_file_that_cannot_be_read_is_damage(ranks: Any, killed: Path, tasks: Path, name: str) -> None:
    document = recipe_of(tasks, f"failing {name}")
    copy_run(killed, f"failing {name}")
    lines = ranks(1)(run_on_a_failing_disk, document, name)[0]
    assert f"checkpoint step-00000006 is damaged ({name} cannot be read (Input/output error)); going back" in lines[0]
    assert "resumed from step-00000003" in lines[1]


# From <sched.h> and <sys/mount.h>.
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
READ_ONLY, REMOUNT, BIND = 1, 32, 4096
NOT_HERE = 99  # the exit status if the folder could not be mounted


def run_forked_on_read_only(folder: str, words: list[str], files: list[str]) -> None:
    """Run dscl in this process, which has its own mount namespace in which the folder is read-only."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.geteuid(), os.getegid()
    try:
        _raise_on_error(libc.unshare(NEW_USER | NEW_MOUNTS))
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(line)
        place = folder.encode()
        _raise_on_error(libc.mount(place, place, None, BIND, None))
        _raise_on_error(libc.mount(None, place, None, REMOUNT | BIND | READ_ONLY, None))
    except OSError as error:
        Path(files[1]).write_text(str(error))
        os._exit(NOT_HERE)
    programs._run_forked_program(words, os.getcwd(), False, dict(os.environ), files)


def _raise_on_error(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def run_on_read_only(folder: Path, *words: str) -> tuple[int, str]:
    """Run dscl with this folder mounted read-only; its exit status and stderr. A mount is used because file permissions
    do not restrict root."""
    with tempfile.TemporaryDirectory() as place:
        files = [str(Path(place, name)) for name in ("out", "err")]
        process: Any = fork_context().Process(target=run_forked_on_read_only, args=(str(folder), list(words), files))  # type: ignore[attr-defined]
        process.start()
        process.join(120)
        stderr = Path(files[1]).read_text()
    if process.exitcode == NOT_HERE:
        pytest.skip(f"nothing can be mounted here: {stderr}")
    return process.exitcode, stderr


def test_a_run_directory_that_is_read_only_is_told_in_one_line(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    """With a new run directory and with one that has checkpoints; nothing is lost."""
    document = recipe_of(tasks, "locked/run")
    (tasks / "locked").mkdir()
    path = tasks / "locked.yaml"
    path.write_text(yaml.safe_dump(document))
    for _ in range(2):
        status, stderr = run_on_read_only(tasks / "locked", "train", str(path))
        assert status == 2, stderr
        (line,) = stderr.splitlines()
        assert line == f"dscl: run_dir: {document['run_dir']} cannot be written (Read-only file system); choose another"
        ranks(1)(run_until_killed, document, 5)
    ranks(1)(run, document)
    assert run_outcome(tasks / "locked" / "run") == run_outcome(undisturbed_run(*reference_recipe(tasks, world=1)))


def test_a_cache_that_is_read_only_serves(ranks: Any, tasks: Path) -> None:
    """Complete entries are used; a missing entry is an error, because the cache cannot be written."""
    document = recipe_of(tasks, "cached", data={"cache_dir": str(tasks / "another cache")}, train__epochs=1)
    path = tasks / "cached.yaml"
    path.write_text(yaml.safe_dump(document))
    (tasks / "another cache").mkdir()
    status, stderr = run_on_read_only(tasks / "another cache", "train", str(path))
    assert status == 1, stderr
    (line,) = stderr.splitlines()
    assert "the cache cannot be written (Read-only file system); see data.cache_dir" in line
    ranks(1)(run, recipe_of(tasks, "fills it", data=document["data"], train__epochs=1))
    status, stderr = run_on_read_only(tasks / "another cache", "train", str(path))
    assert status == 0, stderr
    assert json.loads((tasks / "cached" / "scores.json").read_text())["complete"]
