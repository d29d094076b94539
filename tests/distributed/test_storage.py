"""Faults of storage, on real runs: each told in one line, and what was there before is good to go on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from dscl import checkpoint
from dscl.checkpoint import MARKER
from dscl.observe import metrics
from tests.support.runs import failing, outcome, recipe_of, run, run_listening, run_until_killed, write_tasks

FULL = "No space left on device"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    write_tasks(folder)
    return folder


@contextmanager
def opening(module: Any, instead: Any) -> Iterator[None]:
    """The module's `open` is another one."""
    module.open = instead
    try:
        yield
    finally:
        del module.open


def on_a_full_disk(document: dict[str, Any], name: str) -> tuple[str, str]:
    """Run; what is written to the file of that name goes to a disk that is full."""

    def opened(path: Path, mode: str = "r", **more: Any) -> Any:
        full = Path(path).name == name and mode in ("wb", "ab")
        return open("/dev/full" if full else path, mode, **more)

    with opening(checkpoint, opened), opening(metrics, opened):
        return failing(document)


@pytest.mark.parametrize("name", ["state.json", MARKER, "metrics.jsonl", "scores.json"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here, which stands for a full disk")
def test_a_full_disk_is_told_whichever_file_it_hits(ranks: Any, tasks: Path, name: str) -> None:
    document = recipe_of(tasks, f"full {name}")
    folder = Path(document["run_dir"])
    ranks(1)(run_until_killed, document, 7)
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert before == ["step-00000003", "step-00000006"]
    partial = folder / "scores.json.partial"
    if name == "scores.json":
        partial.symlink_to("/dev/full")
    ((kind, message),) = ranks(1)(on_a_full_disk, document, name)
    assert kind == "Failure"
    assert FULL in message
    assert len(message.splitlines()) == 1
    assert str(folder) in message
    there = sorted(path.name for path in (folder / "checkpoints").iterdir())
    if name in ("state.json", MARKER):
        assert "step-00000006 is intact" in message
        assert there == before
    partial.unlink(missing_ok=True)
    (line,) = [line for line in ranks(1)(run_listening, document)[0] if "resumed" in line]
    assert f"resumed from {there[-1]}" in line
    ranks(1)(run, recipe_of(tasks, "full, whole"))
    assert outcome(folder) == outcome(tasks / "full, whole")


def on_a_failing_disk(document: dict[str, Any], name: str) -> list[str]:
    """Run, where a file of that name can be opened and not be read; what was told."""

    def opened(path: Path, mode: str = "r", **more: Any) -> Any:
        if Path(path).name == name and Path(path).parent.name == "step-00000006" and mode == "rb":
            raise OSError(5, os.strerror(5), str(path))
        return open(path, mode, **more)

    with opening(checkpoint, opened):
        return run_listening(document)


@pytest.mark.parametrize("name", ["state.json", "rank-00000.safetensors"])
def test_a_file_that_cannot_be_read_is_damage(ranks: Any, tasks: Path, name: str) -> None:
    document = recipe_of(tasks, f"failing {name}")
    ranks(1)(run_until_killed, document, 7)
    lines = ranks(1)(on_a_failing_disk, document, name)[0]
    assert f"checkpoint step-00000006 is damaged ({name} cannot be read (Input/output error)); going back" in lines[0]
    assert "resumed from step-00000003" in lines[1]


# As root the permissions of files count for nothing, so what is read-only has to be mounted so.
READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 99
shift
exec "$@"
"""


def read_only(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run dscl where this folder is mounted read-only."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", READ_ONLY, "-"]
    try:
        done = subprocess.run(
            [*unshare, str(folder), sys.executable, "-m", "dscl", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("unshare is not here")
    if done.returncode in (1, 99) and ("unshare:" in done.stderr or "mount:" in done.stderr):
        pytest.skip(f"nothing can be mounted here: {done.stderr.splitlines()[0]}")
    return done


def test_a_run_directory_that_is_read_only_is_told_in_one_line(ranks: Any, tasks: Path) -> None:
    """A new one and one that has checkpoints alike; and nothing is lost."""
    document = recipe_of(tasks, "locked/run")
    (tasks / "locked").mkdir()
    path = tasks / "locked.yaml"
    path.write_text(yaml.safe_dump(document))
    for _ in range(2):
        done = read_only(tasks / "locked", "train", str(path))
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line == f"dscl: run_dir: {document['run_dir']} cannot be written (Read-only file system); choose another"
        ranks(1)(run_until_killed, document, 5)
    ranks(1)(run, document)
    ranks(1)(run, recipe_of(tasks, "locked, whole"))
    assert outcome(tasks / "locked" / "run") == outcome(tasks / "locked, whole")


def test_a_cache_that_is_read_only_serves(ranks: Any, tasks: Path) -> None:
    """What is complete in it; else it is told that it cannot be written."""
    document = recipe_of(tasks, "cached", data={"cache_dir": str(tasks / "another cache")})
    path = tasks / "cached.yaml"
    path.write_text(yaml.safe_dump(document))
    (tasks / "another cache").mkdir()
    done = read_only(tasks / "another cache", "train", str(path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "the cache cannot be written (Read-only file system); see data.cache_dir" in line
    ranks(1)(run, recipe_of(tasks, "fills it", data=document["data"]))
    done = read_only(tasks / "another cache", "train", str(path))
    assert done.returncode == 0, done.stderr
    assert json.loads((tasks / "cached" / "scores.json").read_text())["complete"]
